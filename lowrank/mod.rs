//! Low-rank parameters and the optimizers that move them.
//!
//! Reading order: pair.rs (W = A·Bᵀ as data), params.rs (a model's parameters), newton_schulz.rs and spectral.rs (two pure
//! functions), radius.rs, spectron.rs (the paper's Algorithm 1, a thin loop over them). AdamW, schedules and initialisation stand
//! beside. What goes beyond the paper: orthogonaliser.rs, certified.rs with certificate.rs, gauge.rs.
//!
//! What Spectron is compared with, one file each: adamw.rs, muon.rs, lora_muon.rs, and renormalised.rs for its ablation. The
//! four arms share their momentum and their weight decay (of W):
//!
//! | | momentum as it is | orthogonalised |
//! |---|---|---|
//! | step η | [`MomentumOnly`] (neither) | [`Muon`] per factor |
//! | step η/(σ_A + σ_B + 1) | [`Renormalised`] | [`Spectron`] (both) |

mod adamw;
mod certificate;
mod certified;
mod eigen;
mod gauge;
mod init;
mod lora_muon;
mod momentum;
mod muon;
mod newton_schulz;
mod optimizer;
mod orthogonaliser;
mod pair;
mod params;
mod quintic;
mod radius;
mod renormalised;
mod schedule;
mod spectral;
mod spectron;
mod svd;
mod telemetry;

pub use adamw::AdamW;
pub use certificate::{certify_spectral_norm, spectral_norm_upper_bound, upper_bound_flops};
pub use certified::CERTIFICATE_EVERY;
pub use init::{PairInit, gaussian, haar, pair as init_pair, spectral_values};
pub use lora_muon::LoraMuon;
pub use muon::{Muon, MuonScale};
pub use newton_schulz::{NewtonSchulz, Space, newton_schulz};
pub use optimizer::{Optimizer, Rule, State, StepReport, clip_global_norm, shape_scale};
pub use orthogonaliser::{Orthogonaliser, POLAR_EXPRESS};
pub use pair::{Costs, FactorPair, rank_for_energy};
pub use params::{Dense, Hidden, Leaves, Pair, PairVar, ParamVars, Params, Values};
pub use radius::{Radius, exact_radius, update_radius};
pub use renormalised::{MomentumOnly, Renormalised};
pub use schedule::{Schedule, ScheduleKind};
pub use spectral::{power_iteration, spectral_norm_estimate, start_vector};
pub use spectron::{Spectron, SpectronConfig};
pub use telemetry::{Accuracy, MatrixTelemetry, PairTelemetry, matrix_telemetry, pair_telemetry};
