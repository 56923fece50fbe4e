//! Low-rank parameters and the optimizers that move them.
//!
//! Reading order: pair.rs (W = A·Bᵀ as data), params.rs (a model's parameters), newton_schulz.rs and spectral.rs (two pure
//! functions), spectron.rs (the paper's Algorithm 1, a thin loop over them). AdamW, schedules and initialisation stand beside.

mod adamw;
mod certificate;
mod init;
mod newton_schulz;
mod optimizer;
mod pair;
mod params;
mod schedule;
mod spectral;
mod spectron;
mod svd;

pub use adamw::AdamW;
pub use certificate::{certify_spectral_norm, spectral_norm_upper_bound};
pub use init::{PairInit, gaussian, haar, pair as init_pair, spectral_values};
pub use newton_schulz::{NewtonSchulz, newton_schulz};
pub use optimizer::{Optimizer, Rule, State, clip_global_norm};
pub use pair::{Costs, FactorPair};
pub use params::{Dense, Hidden, Pair, PairVar, ParamVars, Params, Values};
pub use schedule::{Schedule, ScheduleKind};
pub use spectral::{power_iteration, spectral_norm_estimate, start_vector};
pub use spectron::{Radius, Spectron, SpectronConfig, StepReport, exact_radius, update_radius};
