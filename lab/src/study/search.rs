//! Which runs an arm of a study needs next, given what its finished runs came to: a pure function, so that a study that was
//! stopped goes on by asking it again.
//!
//! Each rate of the grid at the first seed; one more rate, up to a bound, on the side where the best one is the last; then
//! the best rate of the rest by AdamW in the same way; then the other seeds at the best rates.
//! Not here: which arms there are (plan.rs), and how a run is run (execute.rs).

use crate::config::Config;

/// One configuration over learning rates and seeds. Rates are factors on those of `config`.
#[derive(Clone, Debug)]
pub struct Arm {
    pub label: String,
    pub config: Config,
    /// Factors on the rate of the blocks' matrices, ascending.
    pub grid: Vec<f64>,
    /// Factors on the rate of everything else, ascending, tried at the best of the first.
    pub adam_grid: Vec<f64>,
    /// The rate of everything else moves with the first: AdamW trains all.
    pub coupled: bool,
    /// Factors on the best rate at which all seeds run.
    pub multiples: Vec<f64>,
    pub seeds: Vec<u64>,
    /// How many rates may be added to a grid.
    pub extensions: usize,
}

/// One training run of a study.
#[derive(Clone, Debug, PartialEq)]
pub struct Trial {
    /// The name of its directory.
    pub id: String,
    pub config: Config,
}

/// A factor chosen from a grid.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    pub factor: f64,
    /// Whether a smaller and a larger one were tried.
    pub interior: bool,
    pub loss: f64,
}

/// Where an arm stands.
#[derive(Clone, Debug, Default)]
pub struct State {
    /// All runs that are known to be needed, finished ones too, in order and without repeats.
    pub trials: Vec<Trial>,
    /// Runs that will be needed beside them, at least.
    pub expected: usize,
    /// Once it is known: the run at the best rates and the first seed, and whether its rate is interior. None also if every
    /// rate diverged.
    pub best: Option<(Trial, bool)>,
    /// The runs at the best rates, one for each seed.
    pub at_best: Vec<Trial>,
}

impl Arm {
    /// What is known of the arm, given the validation losses of its finished runs: None for one that is not finished,
    /// infinity for one that diverged.
    pub fn state(&self, loss: &dyn Fn(&Trial) -> Option<f64>) -> State {
        let first = self.seeds[0];
        let at_first = usize::from(self.multiples.contains(&1.0));
        let expected = self.seeds.len() * self.multiples.len() - at_first;
        let mut state = State { expected, ..State::default() };
        let (tried, lr) = search(&self.grid, self.extensions, &|f| loss(&self.trial(f, 1.0, first)));
        tried.iter().for_each(|&f| state.add(self.trial(f, 1.0, first)));
        let Some(lr) = lr else { return state };
        let of_rest = |adam: f64| self.trial(lr.factor, adam, first);
        let (tried, adam) = match self.coupled {
            true => (vec![], Some(Choice { factor: 1.0, ..lr })),
            false => search(&self.adam_grid, self.extensions, &|f| loss(&of_rest(f))),
        };
        tried.iter().for_each(|&f| state.add(of_rest(f)));
        let Some(adam) = adam else { return state };
        state.expected = 0;
        if adam.loss == f64::INFINITY {
            return state; // nothing that more seeds could average
        }
        state.best = Some((of_rest(adam.factor), lr.interior));
        for &multiple in &self.multiples {
            for &seed in &self.seeds {
                state.add(self.trial(lr.factor * multiple, adam.factor, seed));
            }
        }
        state.at_best = self.seeds.iter().map(|&s| self.trial(lr.factor, adam.factor, s)).collect();
        state
    }

    /// The run at these factors. Rates are rounded to four digits: short to write, and then exact.
    pub fn trial(&self, lr: f64, adam: f64, seed: u64) -> Trial {
        let adam = if self.coupled { lr } else { adam };
        let (lr, adam_lr) = (four_digits(self.config.lr * lr), four_digits(self.config.adam_lr * adam));
        let id = format!("{}-lr{lr}-adam{adam_lr}-seed{seed}", self.label);
        Trial { id, config: Config { lr, adam_lr, seed, ..self.config.clone() } }
    }
}

impl State {
    fn add(&mut self, trial: Trial) {
        if self.trials.iter().all(|t| t.id != trial.id) {
            self.trials.push(trial);
        }
    }
}

/// All factors of the grid, extended as far as the losses known so far ask for it; and the best, once it stands.
///
/// The grid goes on by the ratio of its two outermost factors. A grid of one factor is taken as given.
fn search(grid: &[f64], extensions: usize, loss: &dyn Fn(f64) -> Option<f64>) -> (Vec<f64>, Option<Choice>) {
    let mut factors = grid.to_vec();
    loop {
        let Some(losses) = factors.iter().map(|&f| loss(f)).collect::<Option<Vec<_>>>() else {
            return (factors, None);
        };
        // the first of equals: if all diverged, the smallest
        let best =
            (0..losses.len()).reduce(|a, b| if losses[b] < losses[a] { b } else { a }).expect("a grid");
        let last = factors.len() - 1;
        let interior = 0 < best && best < last;
        if interior || last == 0 || factors.len() == grid.len() + extensions {
            return (factors.clone(), Some(Choice { factor: factors[best], interior, loss: losses[best] }));
        }
        match best {
            0 => factors.insert(0, factors[0] * (factors[0] / factors[1])),
            _ => factors.push(factors[last] * (factors[last] / factors[last - 1])),
        }
    }
}

fn four_digits(x: f64) -> f64 {
    format!("{x:.3e}").parse().expect("a number, just printed")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Overrides;

    /// Searches with everything known.
    fn found(grid: &[f64], loss: impl Fn(f64) -> f64) -> (Vec<f64>, Choice) {
        let (factors, best) = search(grid, 3, &|f| Some(loss(f)));
        (factors, best.unwrap())
    }

    #[test]
    fn the_grid_grows_until_the_best_is_interior() {
        let bowl = |at: f64| move |f: f64| (f / at).ln().abs();
        let (factors, best) = found(&[0.5, 1.0, 2.0], bowl(1.0));
        assert_eq!((factors, best.factor, best.interior), (vec![0.5, 1.0, 2.0], 1.0, true));
        let (factors, best) = found(&[0.5, 1.0, 2.0], bowl(4.0));
        assert_eq!((factors, best.factor, best.interior), (vec![0.5, 1.0, 2.0, 4.0, 8.0], 4.0, true));
        let (factors, best) = found(&[0.5, 1.0, 3.0], bowl(0.2));
        assert_eq!((factors, best.factor, best.interior), (vec![0.125, 0.25, 0.5, 1.0, 3.0], 0.25, true));
        // three more at most
        let (factors, best) = found(&[1.0, 3.0], bowl(1e6));
        assert_eq!((factors, best.factor, best.interior), (vec![1.0, 3.0, 9.0, 27.0, 81.0], 81.0, false));
        // a rate that diverges is tried all the same: beyond the best, it makes it interior
        let (factors, best) = found(&[0.5, 1.0], |f| if f > 1.0 { f64::INFINITY } else { -f });
        assert_eq!((factors, best.factor, best.interior), (vec![0.5, 1.0, 2.0], 1.0, true));
        // all diverge: downwards
        let (factors, best) = found(&[1.0, 2.0], |_| f64::INFINITY);
        assert_eq!((factors, best.loss), (vec![0.125, 0.25, 0.5, 1.0, 2.0], f64::INFINITY));
        let (factors, best) = found(&[1.0], |_| 3.0);
        assert_eq!((factors, best.interior), (vec![1.0], false));
    }

    fn arm() -> Arm {
        Arm {
            label: "a".into(),
            config: Config { lr: 0.1, adam_lr: 0.01, ..Overrides::default().resolve().unwrap() },
            grid: vec![0.5, 1.0, 2.0],
            adam_grid: vec![1.0],
            coupled: false,
            multiples: vec![1.0],
            seeds: vec![7, 8],
            extensions: 3,
        }
    }

    fn ids(state: &State) -> Vec<&str> {
        state.trials.iter().map(|t| t.id.as_str()).collect()
    }

    #[test]
    fn seeds_follow_the_rates() {
        let state = arm().state(&|_| None);
        let grid = ["a-lr0.05-adam0.01-seed7", "a-lr0.1-adam0.01-seed7", "a-lr0.2-adam0.01-seed7"];
        assert_eq!((ids(&state), state.expected), (grid.to_vec(), 1));
        assert_eq!(state.trials[2].config, Config { lr: 0.2, seed: 7, ..arm().config });
        let loss = |t: &Trial| Some((t.config.lr - 0.1).abs());
        let state = arm().state(&loss);
        assert_eq!(ids(&state), [&grid[..], &["a-lr0.1-adam0.01-seed8"]].concat());
        let (best, interior) = state.best.unwrap();
        assert_eq!((best.id.as_str(), interior, state.expected), (grid[1], true, 0));
        let state = arm().state(&|_| Some(f64::INFINITY));
        assert!(state.best.is_none() && state.trials.iter().all(|t| t.config.seed == 7));
    }

    #[test]
    fn the_rest_has_its_own_rate_or_moves_along() {
        let loss = |t: &Trial| Some((t.config.lr - 0.1).abs() + (t.config.adam_lr - 0.02).abs());
        let both = Arm { adam_grid: vec![0.5, 1.0, 2.0], ..arm() };
        let (best, _) = both.state(&loss).best.unwrap();
        assert_eq!((best.config.lr, best.config.adam_lr), (0.1, 0.02));
        assert_eq!(both.state(&loss).trials.len(), 3 + 3 + 1); // 0.005, 0.02, 0.04; seed 8
        let along = Arm { coupled: true, ..both };
        let pairs: Vec<_> =
            along.state(&|_| None).trials.iter().map(|t| (t.config.lr, t.config.adam_lr)).collect();
        assert_eq!(pairs, [(0.05, 0.005), (0.1, 0.01), (0.2, 0.02)]);
    }

    #[test]
    fn multiples_of_the_best_run_with_all_seeds() {
        let arm = Arm { grid: vec![1.0], multiples: vec![1.0, 3.0], ..arm() };
        let state = arm.state(&|_| Some(1.0));
        let rates: Vec<_> = state.trials.iter().map(|t| (t.config.lr, t.config.seed)).collect();
        assert_eq!(rates, [(0.1, 7), (0.1, 8), (0.3, 7), (0.3, 8)]);
    }
}
