//! Handwritten digits: an MLP and a small vision transformer on MNIST, whole matrices and factor pairs, five methods.
//!
//! Data: MNIST's second pair of files, 10,000 digits. Of each ten in a row eight are for training and two for the test (2,000
//! digits). Every method takes the same 600 steps of 100 digits, and gets its own best learning rate: powers of two around a
//! start, extended until the best is inside, by the accuracy on every eighth training digit, which those runs do not
//! train on (one seed); then three runs on all 8,000. Embeddings, biases, gains and the head are AdamW's under all methods; where
//! AdamW is not the rule of the matrices too, its rate is searched likewise, after theirs. No augmentation, no dropout, no weight
//! decay: this compares optimizers, and is no record. One thread per run; about 9 minutes on one core. The table goes to stdout, a
//! line of CSV per run to stderr.
//! Letters: N digits, d width, f hidden width, r rank = a quarter of a matrix's shorter side.
//!
//! ```text
//! $ cargo run --release --example 09_mnist
//! nothing to do: RANKGRAD_DATA must name a directory with t10k-images-idx3-ubyte.gz and t10k-labels-idx1-ubyte.gz, MNIST's test files (any mirror of it has them)
//! ```
//!
//! With the data, `RANKGRAD_DATA=DIRECTORY cargo run --release --example 09_mnist` (seconds are the machine's):
//!
//! ```text
//! | network | method | parameters | learning rates tried: matrices / rest | test accuracy, % | seconds |
//! |---|---|---|---|---|---|
//! | transformer | dense Muon | 70,656 | 0.01, **0.02**, 0.04 / 0.002, **0.004**, 0.008 | 94.80 ± 0.53 | 11.3 |
//! | transformer | dense AdamW | 70,656 | 0.002, 0.004, **0.008**, 0.016 | 94.48 ± 0.71 | 10.7 |
//! | transformer | Spectron on factors | 33,792 | 0.025, 0.05, **0.1**, 0.2 / 0.002, 0.004, **0.008**, 0.016 | 94.47 ± 0.28 | 9.3 |
//! | transformer | Muon on each factor | 33,792 | 0.005, **0.01**, 0.02, 0.04 / 0.002, **0.004**, 0.008 | 93.85 ± 0.38 | 8.2 |
//! | transformer | AdamW on factors | 33,792 | 0.002, 0.004, **0.008**, 0.016 | 94.15 ± 0.79 | 7.2 |
//! | MLP | dense Muon | 269,322 | 0.005, **0.01**, 0.02, 0.04 / 0.001, **0.002**, 0.004, 0.008 | 96.58 ± 0.23 | 9.8 |
//! | MLP | dense AdamW | 269,322 | 0.002, **0.004**, 0.008 | 96.48 ± 0.19 | 1.3 |
//! | MLP | Spectron on factors | 102,410 | 0.0125, **0.025**, 0.05, 0.1 / 0.002, **0.004**, 0.008 | 96.28 ± 0.25 | 1.2 |
//! | MLP | Muon on each factor | 102,410 | 0.005, **0.01**, 0.02, 0.04 / 0.002, **0.004**, 0.008 | 96.52 ± 0.19 | 1.4 |
//! | MLP | AdamW on factors | 102,410 | 0.002, **0.004**, 0.008 | 96.13 ± 0.28 | 0.6 |
//! ```

use flate2::read::GzDecoder;
use rand::seq::SliceRandom;
use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
use rankgrad::{
    autograd::{Tape, Var},
    lowrank::{
        AdamW, Dense, FactorPair, Hidden, Muon, MuonScale, Optimizer, Pair, PairInit, ParamVars, Params,
        Rule, Schedule, ScheduleKind, Spectron, SpectronConfig, clip_global_norm, gaussian, init_pair,
    },
    tensor::{Attention, Cpu, Tensor},
};
use std::{io::Read, path::Path, process::ExitCode, sync::Mutex, time::Instant};

type B = Cpu<f32>;
type PairRule = Box<dyn Rule<B, FactorPair<B>>>;
type Build = fn(&mut Builder) -> Network;

const IMAGES: &str = "t10k-images-idx3-ubyte";
const LABELS: &str = "t10k-labels-idx1-ubyte";
const DIGITS: usize = 10_000;
const SIDE: usize = 28;
const PIXELS: usize = SIDE * SIDE;
const CLASSES: usize = 10;

const HIDDEN: usize = 256; // the MLP's width
const PATCH: usize = 7; // side of a patch
const TOKENS: usize = (SIDE / PATCH) * (SIDE / PATCH); // 16 per digit
const D: usize = 64;
const F: usize = 128;
const BLOCKS: usize = 2;
const HEADS: usize = 4;

const BATCH: usize = 100;
const STEPS: u64 = 600;
const REST: f64 = 4e-3; // where the search begins for AdamW's rate of what is no hidden matrix

/// The elements of an idx file of bytes whose axes must be `sizes`: a magic number (0x0800 + the number of axes) and the sizes,
/// as big-endian words, then the elements.
fn parse_idx(bytes: &[u8], sizes: &[usize]) -> Result<Vec<u8>, String> {
    let (header, body) = bytes.split_at_checked(4 + 4 * sizes.len()).ok_or_else(|| {
        format!("{} bytes are too few for the header of an idx file of {} axes", bytes.len(), sizes.len())
    })?;
    let words: Vec<usize> = header
        .chunks_exact(4)
        .map(|word| u32::from_be_bytes(word.try_into().expect("four bytes")) as usize)
        .collect();
    let magic = 0x0800 + sizes.len();
    if words[0] != magic {
        return Err(format!(
            "the magic number is {:#010x}, not {magic:#010x}: no idx file of this kind",
            words[0]
        ));
    }
    if words[1..] != *sizes {
        return Err(format!("the header says {:?}, expected were {sizes:?}", &words[1..]));
    }
    let expected: usize = sizes.iter().product();
    if body.len() != expected {
        return Err(format!(
            "{} bytes after the header, {expected} belong there: cut short or damaged",
            body.len()
        ));
    }
    Ok(body.to_vec())
}

/// [`parse_idx`] of the file `name` or, if there is none, `name`.gz. Errors say which file.
fn read_idx(directory: &Path, name: &str, sizes: &[usize]) -> Result<Vec<u8>, String> {
    let (plain, packed) = (directory.join(name), directory.join(format!("{name}.gz")));
    let path = if plain.exists() { &plain } else { &packed };
    let at = |what: String| format!("{}: {what}", path.display());
    let mut bytes = std::fs::read(path).map_err(|e| at(format!("{e}; RANKGRAD_DATA names its directory")))?;
    if path == &packed {
        let mut unpacked = Vec::new();
        GzDecoder::new(&bytes[..]).read_to_end(&mut unpacked).map_err(|e| at(format!("gzip: {e}")))?;
        bytes = unpacked;
    }
    parse_idx(&bytes, sizes).map_err(at)
}

/// Where element i of a digit that is kept patch by patch stands in the image, which is kept row by row.
fn patch_order(i: usize) -> usize {
    let (patch, inside) = (i / (PATCH * PATCH), i % (PATCH * PATCH));
    let (row, col) = (patch / (SIDE / PATCH), patch % (SIDE / PATCH));
    (row * PATCH + inside / PATCH) * SIDE + col * PATCH + inside % PATCH
}

struct Digits {
    /// [digits, 784], patch by patch, about mean 0 and deviation 1. To the MLP the order of pixels is all the same.
    pixels: Tensor<B>,
    labels: Vec<u32>,
}

impl Digits {
    fn read(directory: &Path) -> Result<Self, String> {
        let images = read_idx(directory, IMAGES, &[DIGITS, SIDE, SIDE])?;
        let labels = read_idx(directory, LABELS, &[DIGITS])?;
        if let Some(i) = labels.iter().position(|label| usize::from(*label) >= CLASSES) {
            let path = directory.join(LABELS);
            return Err(format!("{}: label {i} is {}, which is no digit", path.display(), labels[i]));
        }
        let pixel = |i: usize| f32::from(images[i / PIXELS * PIXELS + patch_order(i % PIXELS)]) / 255.0;
        let pixels = Tensor::from_fn(&B::default(), [DIGITS, PIXELS], |i| (pixel(i) - 0.13) / 0.31); // [digits, 784]
        Ok(Self { pixels, labels: labels.into_iter().map(u32::from).collect() })
    }

    /// The digits `ids`: pixels [N, 784] and labels.
    fn batch<'t>(&self, tape: &'t Tape<B>, ids: &[u32]) -> (Var<'t, B>, Vec<u32>) {
        let labels = ids.iter().map(|&i| self.labels[i as usize]).collect();
        (tape.constant(&self.pixels).embedding(ids), labels) // [N, 784]
    }
}

/// A hidden matrix [m, n], whole or as a pair.
#[derive(Clone, Copy)]
enum Matrix {
    Whole(Hidden),
    Factored(Pair),
}

impl Matrix {
    /// x [.., n] · Wᵀ → [.., m].
    fn of<'t>(self, w: &ParamVars<'t, B>, x: Var<'t, B>) -> Var<'t, B> {
        match self {
            Self::Whole(matrix) => x.linear(w[matrix]),
            Self::Factored(pair) => x.lowrank_linear(w[pair].a, w[pair].b),
        }
    }
}

/// Adds parameters one by one. Each is drawn with the deviation √(1/n), n its inputs.
struct Builder {
    params: Params<B>,
    rng: ChaCha8Rng,
    factored: bool,
}

impl Builder {
    fn matrix(&mut self, name: &str, [m, n]: [usize; 2]) -> Matrix {
        let Self { params, rng, .. } = self;
        let (cpu, std) = (B::default(), 1.0 / (n as f64).sqrt());
        if self.factored {
            let pair = init_pair(&cpu, rng, [m, n], m.min(n) / 4, std, PairInit::Spectral); // [m, r], [n, r]
            return Matrix::Factored(params.pair(name, pair));
        }
        Matrix::Whole(params.hidden(name, gaussian(&cpu, rng, [m, n], std))) // [m, n]
    }

    fn table(&mut self, name: &str, [m, n]: [usize; 2]) -> Dense {
        let std = 1.0 / (n as f64).sqrt();
        self.params.dense(name, gaussian(&B::default(), &mut self.rng, [m, n], std)) // [m, n]
    }

    fn vector(&mut self, name: &str, len: usize, value: f64) -> Dense {
        self.params.dense(name, Tensor::full(&B::default(), [len], value)) // [len]
    }
}

enum Network {
    Mlp { layers: [(Matrix, Dense); 2], head: Dense, bias: Dense },
    Transformer { patches: Dense, positions: Dense, blocks: [Block; BLOCKS], norm: Dense, head: Dense },
}

struct Block {
    norms: [Dense; 2],
    qkv: [Matrix; 3],
    out: Matrix,
    up: Matrix,
    down: Matrix,
}

impl Network {
    fn mlp(b: &mut Builder) -> Self {
        let layers = [[HIDDEN, PIXELS], [HIDDEN, HIDDEN]]
            .map(|shape| (b.matrix("layer", shape), b.vector("bias", HIDDEN, 0.0)));
        let head = b.table("head", [CLASSES, HIDDEN]); // [10, f]
        Self::Mlp { layers, head, bias: b.vector("bias", CLASSES, 0.0) }
    }

    fn transformer(b: &mut Builder) -> Self {
        let patches = b.table("patches", [D, PATCH * PATCH]); // [d, 49]
        let positions = b.table("positions", [TOKENS, D]); // [16, d]
        let blocks = [(); BLOCKS].map(|_| Block {
            norms: [(); 2].map(|_| b.vector("norm", D, 1.0)),
            qkv: [(); 3].map(|_| b.matrix("qkv", [D, D])),
            out: b.matrix("out", [D, D]),
            up: b.matrix("up", [F, D]),
            down: b.matrix("down", [D, F]),
        });
        let norm = b.vector("norm", D, 1.0);
        Self::Transformer { patches, positions, blocks, norm, head: b.table("head", [CLASSES, D]) }
    }

    /// Logits [N, 10] of digits x [N, 784].
    fn logits<'t>(&self, w: &ParamVars<'t, B>, x: Var<'t, B>) -> Var<'t, B> {
        let n = x.shape().rows();
        match self {
            Self::Mlp { layers, head, bias } => {
                let layer = |h: Var<'t, B>, (matrix, bias): &(Matrix, Dense)| {
                    matrix.of(w, h).add_bias(w[*bias]).relu() // [N, f]
                };
                layers.iter().fold(x, layer).linear(w[*head]).add_bias(w[*bias]) // [N, 10]
            }
            Self::Transformer { patches, positions, blocks, norm, head } => {
                let how = Attention { batch: n, heads: HEADS, kv_heads: HEADS, causal: false };
                let place: Vec<u32> = (0..n * TOKENS).map(|i| (i % TOKENS) as u32).collect();
                let patch = x.reshape([n * TOKENS, PATCH * PATCH]); // [N·16, 49]
                let mut h = patch.linear(w[*patches]) + w[*positions].embedding(&place); // [N·16, d]
                for Block { norms, qkv, out, up, down } in blocks {
                    let x = h.rms_norm(w[norms[0]], 1e-5); // [N·16, d]
                    let [q, k, v] = qkv.map(|matrix| matrix.of(w, x)); // [N·16, d]
                    h = h + out.of(w, q.attention(k, v, how)); // [N·16, d]
                    let x = h.rms_norm(w[norms[1]], 1e-5); // [N·16, d]
                    h = h + down.of(w, up.of(w, x).silu()); // [N·16, f] inside, [N·16, d]
                }
                // the mean over a digit's tokens, after the head, where it is a small product
                let each = h.rms_norm(w[*norm], 1e-5).linear(w[*head]); // [N·16, 10]
                let share =
                    |i: usize| if i / CLASSES % CLASSES == i % CLASSES { 1.0 / TOKENS as f32 } else { 0.0 };
                let mean = Tensor::from_fn(&B::default(), [TOKENS * CLASSES, CLASSES], share); // [160, 10]
                each.reshape([n, TOKENS * CLASSES]).matmul(x.tape().constant(&mean)) // [N, 10]
            }
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Method {
    DenseMuon,
    DenseAdamW,
    Spectron,
    MuonFactors,
    AdamWFactors,
}

impl Method {
    const ALL: [Self; 5] =
        [Self::DenseMuon, Self::DenseAdamW, Self::Spectron, Self::MuonFactors, Self::AdamWFactors];

    /// Its name in the table, and the learning rate of the hidden matrices where its search begins.
    fn line(self) -> (&'static str, f64) {
        match self {
            Self::DenseMuon => ("dense Muon", 0.02),
            Self::DenseAdamW => ("dense AdamW", 4e-3),
            Self::Spectron => ("Spectron on factors", 0.05),
            Self::MuonFactors => ("Muon on each factor", 0.02),
            Self::AdamWFactors => ("AdamW on factors", 4e-3),
        }
    }

    /// Whether everything has one rule, and so one rate.
    fn one_rate(self) -> bool {
        matches!(self, Self::DenseAdamW | Self::AdamWFactors)
    }

    fn factored(self) -> bool {
        !matches!(self, Self::DenseMuon | Self::DenseAdamW)
    }

    /// Nesterov's look-ahead wherever there is momentum; dense Muon with Jordan's scale by shape.
    fn optimizer(self, params: &Params<B>) -> Optimizer<B, PairRule> {
        let pairs = &params.values.pairs;
        let rule: PairRule = match self {
            Self::Spectron => {
                Box::new(Spectron::with(SpectronConfig { nesterov: true, ..Default::default() }, pairs))
            }
            Self::MuonFactors => {
                let mut muon = Muon::for_pairs(pairs);
                muon.nesterov = true;
                Box::new(muon)
            }
            _ => Box::new(AdamW::for_pairs(pairs)),
        };
        let mut optimizer = Optimizer::new(rule, params);
        if self == Self::DenseMuon {
            let mut muon = Muon::new(&params.values.hidden);
            (muon.nesterov, muon.scale) = (true, MuonScale::Aspect);
            optimizer.hidden = Box::new(muon);
        }
        optimizer
    }
}

/// A network and a method: a row of the table.
#[derive(Clone, Copy)]
struct Arm {
    name: &'static str,
    build: Build,
    method: Method,
}

struct Outcome {
    parameters: usize,
    /// Of the digits it was judged on, in percent.
    accuracy: f64,
    /// Mean cross-entropy on them, in nats.
    loss: f64,
    /// Of the training alone.
    seconds: f64,
}

impl Arm {
    /// Trains on the digits `learn` and judges on the digits `judge`; `lr` of the hidden matrices, `rest` of everything else.
    fn run(self, digits: &Digits, [lr, rest]: [f64; 2], seed: u64, [learn, judge]: [&[u32]; 2]) -> Outcome {
        let Self { build, method, .. } = self;
        let cpu = B::default();
        let rng = ChaCha8Rng::seed_from_u64(seed);
        let mut order_rng = rng.clone();
        order_rng.set_stream(1); // so that all methods see the same digits at the same step
        let mut builder = Builder { params: Params::default(), rng, factored: method.factored() };
        let network = build(&mut builder);
        let mut params = builder.params;
        let mut optimizer = method.optimizer(&params);
        let schedule = Schedule { kind: ScheduleKind::Cosine, steps: STEPS, warmup: STEPS / 20, end: 0.0 };
        let begun = Instant::now();
        let mut order: Vec<u32> = Vec::new();
        for step in 0..STEPS {
            if order.len() < BATCH {
                order = learn.to_vec();
                order.shuffle(&mut order_rng);
            }
            let ids = order.split_off(order.len() - BATCH);
            let tape = Tape::new(&cpu);
            let w = params.on(&tape);
            let (x, labels) = digits.batch(&tape, &ids); // [N, 784]
            let loss = network.logits(&w, x).cross_entropy(&labels); // [1]
            let mut grads = w.gradients(loss.backward());
            clip_global_norm(&mut grads, 1.0);
            let factor = schedule.factor(step);
            optimizer.step(&mut params, &grads, lr * factor, rest * factor);
        }
        let seconds = begun.elapsed().as_secs_f64();
        let (mut right, mut loss) = (0, 0.0);
        for ids in judge.chunks(BATCH) {
            let tape = Tape::new(&cpu);
            let (x, labels) = digits.batch(&tape, ids); // [N, 784]
            let logits = network.logits(&params.constants_on(&tape), x); // [N, 10]
            loss += logits.cross_entropy(&labels).value().item() * ids.len() as f64 / judge.len() as f64;
            let rows = logits.value().to_vec();
            right += rows
                .chunks(CLASSES)
                .zip(&labels)
                .filter(|(row, label)| best(row) == **label as usize)
                .count();
        }
        let accuracy = 100.0 * right as f64 / judge.len() as f64;
        let (name, method) = (self.name, method.line().0);
        eprintln!("{name},{method},{lr},{rest},{seed},{},{accuracy:.2},{loss:.4},{seconds:.1}", judge.len());
        Outcome { parameters: params.count(), accuracy, loss, seconds }
    }

    /// Chooses the learning rate, trains three times, and says what came out as a row of the table.
    fn study(self, digits: &Digits) -> String {
        let pick =
            |wanted: fn(u32) -> bool| -> Vec<u32> { (0..DIGITS as u32).filter(|i| wanted(i % 10)).collect() };
        let (train, test) = (pick(|i| i < 8), pick(|i| i >= 8));
        let (learn, validate) = (pick(|i| i < 7), pick(|i| i == 7));
        let (method, start) = self.method.line();
        let validated = |rates: [f64; 2]| self.run(digits, rates, 1, [&learn, &validate]);
        let one = self.method.one_rate();
        let (lr, mut tried) = search(start, |lr| validated([lr, if one { lr } else { REST }]));
        let mut rest = lr;
        if !one {
            let (best, rests) = search(REST, |rest| validated([lr, rest]));
            rest = best;
            tried += &format!(" / {rests}");
        }
        let runs = [1, 2, 3].map(|seed| self.run(digits, [lr, rest], seed, [&train, &test]));
        let mean = |f: fn(&Outcome) -> f64| runs.iter().map(f).sum::<f64>() / 3.0;
        let accuracy = mean(|run| run.accuracy);
        let deviation = (runs.iter().map(|run| (run.accuracy - accuracy).powi(2)).sum::<f64>() / 2.0).sqrt();
        format!(
            "| {} | {method} | {},{:03} | {tried} | {accuracy:.2} ± {deviation:.2} | {:.1} |",
            self.name,
            runs[0].parameters / 1000,
            runs[0].parameters % 1000,
            mean(|run| run.seconds),
        )
    }
}

/// The best of the rates `start` times a power of two, and all that were tried, as the table shows them: three, and then more
/// until the best is not at the end.
fn search(start: f64, run: impl Fn(f64) -> Outcome) -> (f64, String) {
    let attempt = |lr: f64| (lr, run(lr));
    let mut tried = vec![attempt(start / 2.0), attempt(start), attempt(2.0 * start)]; // ascending
    let best = loop {
        let better = |i: &usize, j: &usize| {
            let (x, y) = (&tried[*i].1, &tried[*j].1);
            x.accuracy.total_cmp(&y.accuracy).then(y.loss.total_cmp(&x.loss))
        };
        match (0..tried.len()).max_by(better).expect("three rates") {
            0 => tried.insert(0, attempt(tried[0].0 / 2.0)),
            i if i + 1 == tried.len() => tried.push(attempt(tried[i].0 * 2.0)),
            i => break tried[i].0,
        }
    };
    let shown = tried.iter().map(|&(lr, _)| if lr == best { format!("**{lr}**") } else { lr.to_string() });
    (best, shown.collect::<Vec<_>>().join(", "))
}

/// The index of the largest.
fn best(row: &[f32]) -> usize {
    (0..row.len()).max_by(|&i, &j| row[i].total_cmp(&row[j])).expect("a row")
}

fn main() -> ExitCode {
    let Some(directory) = std::env::var_os("RANKGRAD_DATA") else {
        println!(
            "nothing to do: RANKGRAD_DATA must name a directory with {IMAGES}.gz and {LABELS}.gz, MNIST's test files (any mirror of it has them)"
        );
        return ExitCode::SUCCESS;
    };
    let digits = match Digits::read(Path::new(&directory)) {
        Ok(digits) => digits,
        Err(why) => {
            eprintln!("{why}");
            return ExitCode::FAILURE;
        }
    };
    let networks: [(&str, Build); 2] = [("transformer", Network::transformer), ("MLP", Network::mlp)];
    let arms = networks
        .into_iter()
        .flat_map(|(name, build)| Method::ALL.map(|method| Arm { name, build, method }))
        .enumerate();
    eprintln!("network,method,lr,rest,seed,judged_on,accuracy,loss,seconds");
    // as many arms at a time as rayon would use threads (RAYON_NUM_THREADS), one thread each: then seconds can be compared
    let arms = Mutex::new(arms);
    let work = || {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().expect("a thread");
        let mut rows = Vec::new();
        loop {
            let Some((i, arm)) = arms.lock().expect("nobody panics with it").next() else { return rows };
            rows.push((i, pool.install(|| arm.study(&digits))));
        }
    };
    let mut rows = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..rayon::current_num_threads()).map(|_| scope.spawn(work)).collect();
        workers.into_iter().flat_map(|worker| worker.join().expect("it ran")).collect::<Vec<_>>()
    });
    rows.sort();
    println!(
        "| network | method | parameters | learning rates tried: matrices / rest | test accuracy, % | seconds |"
    );
    println!("|---|---|---|---|---|---|");
    rows.iter().for_each(|(_, row)| println!("{row}"));
    ExitCode::SUCCESS
}

#[cfg(test)]
mod tests {
    use super::*;
    use flate2::{Compression, write::GzEncoder};
    use std::io::Write;

    /// An idx file of bytes 0, 1, 2, …
    fn idx(sizes: &[usize]) -> Vec<u8> {
        let header = std::iter::once(0x0800 + sizes.len()).chain(sizes.iter().copied());
        let elements = (0..sizes.iter().product()).map(|i: usize| i as u8);
        header.flat_map(|word| (word as u32).to_be_bytes()).chain(elements).collect()
    }

    #[test]
    fn idx_files_are_read_or_refused_with_the_reason() {
        let good = idx(&[2, 3, 1]);
        assert_eq!(parse_idx(&good, &[2, 3, 1]).unwrap(), [0, 1, 2, 3, 4, 5]);
        for (bytes, sizes, why) in [
            (good[..15].to_vec(), vec![2, 3, 1], "15 bytes are too few for the header"),
            (Vec::new(), vec![6], "0 bytes are too few"),
            (good.clone(), vec![2, 3], "the magic number is 0x00000803, not 0x00000802"),
            (good.clone(), vec![2, 1, 3], "the header says [2, 3, 1], expected were [2, 1, 3]"),
            (good[..21].to_vec(), vec![2, 3, 1], "5 bytes after the header, 6 belong there"),
            ([&good[..], &[6]].concat(), vec![2, 3, 1], "7 bytes after the header, 6 belong there"),
        ] {
            let said = parse_idx(&bytes, &sizes).unwrap_err();
            assert!(said.starts_with(why), "{said}");
        }
    }

    #[test]
    fn files_are_found_packed_or_not_and_errors_name_them() {
        let directory = std::env::temp_dir().join(format!("rankgrad-mnist-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let (packed, plain) = (directory.join("x.gz"), directory.join("x"));
        let said = |sizes: &[usize]| read_idx(&directory, "x", sizes).unwrap_err();
        assert!(said(&[4]).contains("x.gz: ") && said(&[4]).contains("RANKGRAD_DATA"), "{}", said(&[4]));

        let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(&idx(&[4])).unwrap();
        let bytes = encoder.finish().unwrap();
        std::fs::write(&packed, &bytes).unwrap();
        assert_eq!(read_idx(&directory, "x", &[4]).unwrap(), [0, 1, 2, 3]);
        assert!(said(&[5]).contains("x.gz: the header says [4]"), "{}", said(&[5]));
        std::fs::write(&packed, &bytes[..bytes.len() - 4]).unwrap();
        assert!(said(&[4]).contains("x.gz: gzip: "), "{}", said(&[4]));

        std::fs::write(&plain, idx(&[3])).unwrap(); // goes first
        assert_eq!(read_idx(&directory, "x", &[3]).unwrap(), [0, 1, 2]);
        std::fs::remove_dir_all(&directory).unwrap();
    }

    #[test]
    fn patches_are_squares_of_the_image() {
        let mut all: Vec<usize> = (0..PIXELS).map(patch_order).collect();
        for (patch, pixels) in all.chunks(PATCH * PATCH).enumerate() {
            for (i, pixel) in pixels.iter().enumerate() {
                let (row, col) = (pixel / SIDE, pixel % SIDE);
                assert_eq!((row / PATCH, col / PATCH), (patch / 4, patch % 4));
                assert_eq!((row % PATCH, col % PATCH), (i / PATCH, i % PATCH));
            }
        }
        all.sort();
        assert!(all.into_iter().eq(0..PIXELS));
    }

    /// A digit's logits do not depend on the other digits of its batch; and each of its pixels counts.
    #[test]
    fn digits_of_a_batch_do_not_meet() {
        for (build, factored) in [
            (Network::transformer as Build, true),
            (Network::transformer, false),
            (Network::mlp, true),
            (Network::mlp, false),
        ] {
            let mut b = Builder { params: Params::default(), rng: ChaCha8Rng::seed_from_u64(1), factored };
            let network = build(&mut b);
            let x = gaussian(&B::default(), &mut b.rng, [3, PIXELS], 1.0); // [3, 784]
            let logits = |rows: &[u32]| {
                let tape = Tape::new(x.device());
                let x = tape.leaf(&x); // [3, 784]
                let y = network.logits(&b.params.constants_on(&tape), x.embedding(rows)); // [rows, 10]
                let value = y.value().to_vec();
                let dx = y.sum().backward().get(x).expect("y depends on x").to_vec(); // [3, 784]
                (value, dx)
            };
            let (together, _) = logits(&[0, 1, 2]);
            for i in 0..3 {
                let (alone, dx) = logits(&[i as u32]);
                for (x, y) in alone.iter().zip(&together[i * CLASSES..]) {
                    assert!((x - y).abs() < 1e-4, "{x} {y}"); // logits of size 1, sums of up to 784 products in f32
                }
                let counts = |i: usize| dx[i * PIXELS..][..PIXELS].iter().filter(|d| **d != 0.0).count();
                assert_eq!([0, 1, 2].map(counts), [0, 1, 2].map(|j| if i == j { PIXELS } else { 0 }));
            }
        }
    }
}
