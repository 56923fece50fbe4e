//! FLOPs of a training step, from shapes alone. A multiply-add counts as two.
//!
//! Counted: the matrix products of the layers, of causal attention and of the head, forward, and backward at twice the
//! forward; every operation of the optimizer on matrices and tables. Not counted: what is linear in the activations (norms,
//! rotations, softmax, SwiGLU, the loss, embedding look-ups), attention's recomputation in the backward (as usual for model
//! FLOPs; Chowdhery et al. 2022, arXiv 2204.02311, B), clipping, Nesterov's look-ahead, and balancing. Symmetric products count whole, though
//! one half of them may be copied from the other.
//! Letters: p × q a matrix or factor, s the smaller of both, m × n a layer's W, r rank, T context, d width.

use std::collections::BTreeMap;

use rankgrad::lowrank::{CERTIFICATE_EVERY, Orthogonaliser, upper_bound_flops};

use crate::config::Config;
use crate::guide;
use crate::methods::{Matrices, entry};
use crate::model::matrices;

/// Per optimizer step, all micro-batches together.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepFlops {
    pub forward: f64,
    pub backward: f64,
    pub optimizer: f64,
    /// Self-guided training's part, forward, backward and optimizer of the guides: the mean over the whole run.
    pub guide: f64,
    /// The guides' products, forward and backward, in a step where none is skipped.
    pub guide_products: f64,
}

impl StepFlops {
    /// All of it, as a mean over the run.
    pub fn total(&self) -> f64 {
        self.forward + self.backward + self.optimizer + self.guide
    }
}

/// Σ f(m, n, r) over the matrices of all blocks; r: the rank that a pair has there.
fn sum(c: &Config, f: impl Fn(usize, usize, usize) -> f64) -> f64 {
    matrices(c).iter().map(|(name, [m, n])| f(*m, *n, c.rank(name, [*m, *n]))).sum()
}

/// Trained numbers, the guides of self-guided training not counted: they are gone at the end.
pub fn parameters(c: &Config) -> usize {
    let matrix = |m, n, r| if c.factored() { r * (m + n) } else { m * n };
    let blocks = sum(c, |m, n, r| matrix(m, n, r) as f64) as usize;
    let tables = if c.tie { 1 } else { 2 };
    let gains = (2 * c.layers + 1) * c.dim;
    blocks + tables * c.vocab * c.dim + gains
}

/// FLOPs of one step of training under `c`.
pub fn step_flops(c: &Config) -> StepFlops {
    let entry = entry::<rankgrad::tensor::Cpu<f32>>(c.method);
    let tokens = (c.accumulate * c.batch * c.context) as f64;
    let layers = c.layers as f64;

    let dense = sum(c, |m, n, _| 2.0 * (m * n) as f64); // per token
    let factored = sum(c, |m, n, r| 2.0 * (r * (m + n)) as f64);
    let products = if c.factored() { factored } else { dense };
    // q·kᵀ and p·v, over the (T + 1)/2 keys that a query sees on average
    let attention = 2.0 * 2.0 * c.dim as f64 * 0.5 * (c.context + 1) as f64;
    let head = 2.0 * (c.vocab * c.dim) as f64;
    let forward = tokens * (products + layers * attention + head);

    let tables = if c.tie { 1 } else { 2 };
    let rest = adamw(tables * c.vocab + 2 * c.layers + 1, c.dim); // tables and gains
    let moves = sum(c, |m, n, r| match c.factored() {
        true => (entry.flops)(m, r) + (entry.flops)(n, r),
        false => (entry.flops)(m, n),
    });
    let guide_products = match entry.matrices {
        Matrices::Guided { .. } => 3.0 * tokens * dense,
        _ => 0.0,
    };
    let guide = match entry.matrices {
        Matrices::Guided { skip } => {
            let [exist, computed] = guide::shares(c, skip);
            computed * guide_products + exist * sum(c, |m, n, _| adamw(m, n))
        }
        _ => 0.0,
    };
    StepFlops { forward, backward: 2.0 * forward, optimizer: moves + rest, guide, guide_products }
}

/// What an op does in one step, forward and backward.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Work {
    /// FLOPs of its products.
    Flops([f64; 2]),
    /// Bytes of tensors that it reads or writes, each pass over them once.
    Bytes([f64; 2]),
}

/// The work of one step by name of op. Unlike [`step_flops`] with attention's recomputation: its backward has five products where
/// its forward has two. In self-guided training the guides are left out, and so are the ops that they share with other layers.
pub fn op_work(c: &Config) -> BTreeMap<&'static str, Work> {
    let layers = c.layers as f64;
    let tokens = (c.accumulate * c.batch * c.context) as f64;
    let flops = |f: fn(usize, usize, usize) -> usize| sum(c, |m, n, r| 2.0 * f(m, n, r) as f64) * tokens;
    let float = |numbers: usize| 4.0 * tokens * numbers as f64;
    let (kv_dim, norms) = (c.dim / c.heads * c.kv_heads, 2.0 * layers + 1.0);
    let head = 2.0 * tokens * (c.vocab * c.dim) as f64;
    let scores = tokens * layers * (c.dim * (c.context + 1)) as f64; // 2 FLOPs for half of the pairs of tokens
    let mut work = BTreeMap::from([
        ("attention", Work::Flops([2.0 * scores, 5.0 * scores])),
        ("swiglu", Work::Bytes([3.0, 5.0].map(|passes| passes * layers * float(c.ffn)))),
        ("rope", Work::Bytes([2.0 * layers * float(c.dim + kv_dim); 2])),
        // backward: x and dy are read, dx is written and, but for the last norm, added to the residual stream's
        ("rms_norm", Work::Bytes([2.0 * norms, 3.0 * norms + 6.0 * layers].map(|n| n * float(c.dim)))),
        ("cross_entropy", Work::Bytes([2.0 * float(c.vocab); 2])),
        ("embedding", Work::Bytes([2.0 * float(c.dim), 3.0 * float(c.dim)])),
    ]);
    let products = |forward: f64| Work::Flops([forward, 2.0 * forward]);
    if c.factored() {
        work.insert("lowrank_linear", products(flops(|m, n, r| r * (m + n))));
    }
    if !matches!(entry::<rankgrad::tensor::Cpu<f32>>(c.method).matrices, Matrices::Guided { .. }) {
        let whole = if c.factored() { 0.0 } else { flops(|m, n, _| m * n) };
        work.insert("linear", products(head + whole));
        work.insert("add", Work::Bytes([6.0 * layers * float(c.dim), 0.0])); // its backward shares one gradient
    }
    work
}

/// Per element: 3 for the mean, 4 for the square, 7 for the update.
pub fn adamw(p: usize, q: usize) -> f64 {
    14.0 * (p * q) as f64
}

/// M ← βM + (1−β)∇ and X ← keep·X − step·M: 3 per element each.
pub fn momentum_only(p: usize, q: usize) -> f64 {
    6.0 * (p * q) as f64
}

/// Orthogonalised momentum.
pub fn muon(p: usize, q: usize) -> f64 {
    momentum_only(p, q) + Orthogonaliser::default().flops(p, q)
}

/// Muon, and one step of power iteration on the factor.
pub fn spectron(p: usize, q: usize) -> f64 {
    muon(p, q) + power_iteration(p, q, 1)
}

/// Muon, and a certificate of the factor's norm in one of so many steps.
pub fn spectron_certified(p: usize, q: usize) -> f64 {
    muon(p, q) + upper_bound_flops(p, q) / CERTIFICATE_EVERY as f64
}

/// Three steps of power iteration on the factor and on its momentum, which is scaled to ‖M‖_F = 1 first.
pub fn renormalised(p: usize, q: usize) -> f64 {
    momentum_only(p, q) + 3.0 * (p * q) as f64 + 2.0 * power_iteration(p, q, 3)
}

/// Muon, and S^{−1/2} of the factor: the Gram matrix 2pq², its eigenvectors 9q³ (Golub & Van Loan, 8.3.5), their product
/// 2q³ + q²; and two products with the partner's, 2pq² each.
pub fn lora_muon(p: usize, q: usize) -> f64 {
    let (x, r) = (p as f64, q as f64);
    muon(p, q) + 6.0 * x * r * r + 11.0 * r * r * r + r * r
}

/// Wᵀu once, W·v and Wᵀu per step.
fn power_iteration(p: usize, q: usize, steps: usize) -> f64 {
    (2 * p * q * (1 + 2 * steps)) as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Method, Overrides};

    /// d 8, one layer, 2 query heads and 1 key/value head of size 4, ffn 12, vocabulary 256, tied head, context 3,
    /// 2 sequences in each of 2 micro-batches, rank ratio 0.5, 10 steps.
    fn config(method: Method) -> Config {
        let file = "dim = 8\nlayers = 1\nheads = 2\nkv_heads = 1\nffn = 12\nvocab = 256\ntie = true\ncontext = 3\n\
                    batch = 2\naccumulate = 2\nrank_ratio = 0.5\nsteps = 10\nwarmup = 0\n";
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.toml");
        std::fs::write(&path, file).unwrap();
        Config { method, ..Overrides::from_file(&path).unwrap().resolve().unwrap() }
    }

    /// Per token: q and o 8×8, k and v 4×8, gate and up 12×8, down 8×12:
    /// 64 + 64 + 32 + 32 + 96 + 96 + 96 = 480 multiply-adds, 960 FLOPs. Attention: 2 keys on average (1, 2, 3), 8 numbers
    /// each, twice: 32 multiply-adds, 64 FLOPs. Head: 256·8 = 2048 multiply-adds, 4096 FLOPs. Together 5120; with
    /// 2·2·3 = 12 tokens 61,440 forward and 122,880 backward.
    /// AdamW, 14 per element: 480 in matrices; table 2048 and 3 gains of 8, 2072: 14·2552 = 35,728.
    #[test]
    fn dense_by_hand() {
        let f = step_flops(&config(Method::DenseAdamw));
        assert_eq!((f.forward, f.backward, f.optimizer, f.guide), (61_440.0, 122_880.0, 35_728.0, 0.0));
        assert_eq!(f.total(), 220_048.0);
    }

    /// Ranks: 4 for q, o, gate, up and down, 2 for k and v. Multiply-adds per token: q and o 4·16 = 64 each, k and v
    /// 2·12 = 24 each, gate, up and down 4·20 = 80 each: 416, 832 FLOPs. With attention and head 832 + 64 + 4096 = 4992;
    /// times 12 tokens 59,904.
    /// Factors: 8×4 (both of q and o, one each of gate, up and down: 7), 12×4 (3), 4×2 (2), 8×2 (2): 224 + 144 + 16 + 32 = 416
    /// elements. AdamW: 14·(416 + 2072) = 34,832.
    #[test]
    fn factored_by_hand() {
        let f = step_flops(&config(Method::Adamw));
        assert_eq!((f.forward, f.backward, f.optimizer), (59_904.0, 119_808.0, 34_832.0));
    }

    /// Spectron on the same factors. Momentum and update 6·416 = 2496. Power iteration, 3 products of 2pq: 6·416 = 2496.
    /// Newton–Schulz in Gram space, [2, 3] steps: 3pq, twice 4pqs, five times 2s³ + 3s² + s, three times 6s³:
    /// 8×4: 96 + 2·512 + 5·180 + 3·384 = 3172, seven times 22,204; 12×4: 144 + 2·768 + 900 + 1152 = 3732, three times 11,196;
    /// 4×2: 24 + 2·64 + 5·30 + 3·48 = 446, twice 892; 8×2: 48 + 2·128 + 150 + 144 = 598, twice 1196; together 35,488.
    /// The rest by AdamW: 14·2072 = 29,008. Sum 69,488.
    #[test]
    fn spectron_by_hand() {
        let f = step_flops(&config(Method::Spectron));
        assert_eq!((f.forward, f.optimizer), (59_904.0, 69_488.0));
        // without power iteration; without either
        assert_eq!(step_flops(&config(Method::MuonFactors)).optimizer, 66_992.0);
        assert_eq!(step_flops(&config(Method::MomentumFactors)).optimizer, 31_504.0);
        // 9 per element and twice 7 products of 2pq: (9 + 28)·416 + 29,008
        assert_eq!(step_flops(&config(Method::Renormalised)).optimizer, 44_400.0);
        // beside Muon 6pq² + 11q³ + q², 8×4: 768 + 704 + 16 = 1488, 12×4: 1152 + 720 = 1872, 4×2: 96 + 88 + 4 = 188,
        // 8×2: 192 + 92 = 284: 7·1488 + 3·1872 + 2·188 + 2·284 = 16,976
        assert_eq!(step_flops(&config(Method::LoraMuon)).optimizer, 66_992.0 + 16_976.0);
    }

    /// Beside Muon, in one of 8 steps 3pq + 2pqs + s steps of Lanczos 2s³ + 4s³ + Cholesky s³/3. 8×4: 96 + 256 + 384 + 64/3,
    /// 12×4: 144 + 384 + 384 + 64/3, 4×2: 24 + 32 + 48 + 8/3, 8×2: 48 + 64 + 48 + 8/3:
    /// 7·736 + 3·912 + 2·104 + 2·160 + 10·64/3 + 4·8/3 = 8416 + 224.
    #[test]
    fn certified_spectron_by_hand() {
        let f = step_flops(&config(Method::SpectronCertified));
        assert!((f.optimizer - (66_992.0 + 8640.0 / 8.0)).abs() < 1e-6, "{}", f.optimizer);
    }

    /// Muon on the whole matrices, s = min(p, q): 6·480 = 2880. Newton–Schulz 8×8 as printed, which is cheaper for squares:
    /// 192 + 5·(2048 + 1224) = 16,552, twice; 4×8 in Gram space 3172, twice; 12×8, where both cost the same,
    /// 288 + 5·(3072 + 1224) = 21,768, three times: 104,752. With 29,008 for the rest 136,640.
    #[test]
    fn dense_muon_by_hand() {
        assert_eq!(step_flops(&config(Method::DenseMuon)).optimizer, 136_640.0);
    }

    /// The guides' products: 3·12·960 = 34,560 in a step; their AdamW 14·480 = 6720. They exist in 5 of 10 steps:
    /// 0.5·41,280 = 20,640. Skipping: α = (1 + cos(πt/5))/2, t = 0 … 4, adds up to 3 (the cosines of t and 5 − t cancel,
    /// which leaves 1 of t = 0): 0.3·34,560 + 0.5·6720 = 13,728.
    #[test]
    fn guides_by_hand() {
        let f = step_flops(&config(Method::SelfGuided));
        assert_eq!((f.forward, f.optimizer, f.guide), (59_904.0, 34_832.0, 20_640.0));
        let cheap = step_flops(&config(Method::SelfGuidedCheap));
        assert!((cheap.guide - 13_728.0).abs() < 1e-6, "{}", cheap.guide);
    }

    /// 12 tokens, one layer. Attention per token: 2 keys of 8 numbers, a multiply-add each: 32 FLOPs a product. Pairs 832 and head
    /// 4096 FLOPs as above. SwiGLU: 12 numbers; the norms: 3 times 8; q and k of 12 numbers; the residual's two sums of 8.
    #[test]
    fn work_by_hand() {
        let work = op_work(&config(Method::Spectron));
        let numbers = |n: [f64; 2]| Work::Bytes(n.map(|n| 12.0 * 4.0 * n));
        let flops = |n: [f64; 2]| Work::Flops(n.map(|n| 12.0 * n));
        assert_eq!(work["attention"], flops([64.0, 160.0]));
        assert_eq!(work["lowrank_linear"], flops([832.0, 1664.0]));
        assert_eq!(work["linear"], flops([4096.0, 8192.0]));
        assert_eq!(work["swiglu"], numbers([36.0, 60.0]));
        assert_eq!(work["rope"], numbers([24.0, 24.0]));
        assert_eq!(work["rms_norm"], numbers([48.0, 120.0]));
        assert_eq!(work["cross_entropy"], numbers([512.0, 512.0]));
        assert_eq!(work["add"], numbers([48.0, 0.0]));
        let dense = op_work(&config(Method::DenseMuon));
        assert_eq!(dense["linear"], flops([4096.0 + 960.0, 8192.0 + 1920.0]));
        assert!(
            !dense.contains_key("lowrank_linear")
                && !op_work(&config(Method::SelfGuided)).contains_key("add")
        );
    }

    #[test]
    fn parameters_are_those_of_the_model() {
        for (method, q) in [(Method::Spectron, 4), (Method::Spectron, 7), (Method::DenseMuon, 4)] {
            let ranks = [("blocks.0.q".to_owned(), q)].into();
            let c = Config { tie: method == Method::Spectron, kv_heads: 1, ranks, ..config(method) };
            let (_, params) = crate::model::Model::new(&rankgrad::tensor::Cpu::<f32>::default(), &c);
            assert_eq!(parameters(&c), params.count());
            let products = step_flops(&c).forward - step_flops(&config(method)).forward;
            // three more columns in two factors of 8 rows, 12 tokens
            assert_eq!(products, 12.0 * 2.0 * ((q - 4) * 16) as f64);
        }
    }

    #[test]
    fn an_untied_head_costs_no_products_but_an_update() {
        let tied = step_flops(&config(Method::Spectron));
        let untied = step_flops(&Config { tie: false, ..config(Method::Spectron) });
        assert_eq!(untied.forward, tied.forward);
        assert_eq!(untied.optimizer - tied.optimizer, 14.0 * 2048.0);
    }
}
