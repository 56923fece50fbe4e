//! What the person sees during training and other long work: a bar on a terminal, a plain line now and then elsewhere. And Ctrl-C.
//!
//! Everything goes to standard error: standard output is for results.

use std::io::IsTerminal;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::error::{Error, Result};

/// Time between plain lines.
const PLAIN: Duration = Duration::from_secs(10);

/// The state of one training run, or of other work in steps, shown.
pub struct Progress {
    bar: ProgressBar,
    /// None: no plain lines (a terminal, or quiet).
    last_line: Option<Instant>,
    quiet: bool,
    /// Counts the steps, of several runs together.
    counter: Option<Arc<AtomicU64>>,
}

impl Progress {
    /// For a run of `steps`, `done` of which an earlier part did. `quiet` shows nothing at all.
    pub fn new(steps: u64, done: u64, quiet: bool) -> Self {
        let terminal = std::io::stderr().is_terminal();
        let shown = terminal && !quiet;
        let target = if shown { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let bar = ProgressBar::with_draw_target(Some(steps), target).with_position(done);
        let template = "{bar:24} {pos}/{len}  {msg}  {eta} left";
        bar.set_style(ProgressStyle::with_template(template).expect("a valid template"));
        // The estimator must see the jump to `done` before it forgets it: those steps are no measure of the speed.
        bar.tick();
        bar.reset_eta();
        Progress { bar, last_line: (!terminal && !quiet).then(Instant::now), quiet, counter: None }
    }

    /// Shows nothing; adds each step to `counter`.
    pub fn counting(counter: Arc<AtomicU64>) -> Self {
        Progress { counter: Some(counter), ..Progress::new(0, 0, true) }
    }

    /// After `step` steps: training loss in nats per token, learning rate of the blocks' matrices, tokens per second.
    pub fn step(&mut self, step: u64, loss: f64, lr: f64, tokens_per_second: f64) {
        if let Some(counter) = &self.counter {
            counter.fetch_add(1, Ordering::Relaxed);
        }
        let message = format!("loss {loss:.4}  lr {lr:.2e}  {tokens_per_second:.0} tokens/s");
        self.show("step", step, message);
    }

    /// At `position`; a plain line begins with `what` that counts.
    pub fn show(&mut self, what: &str, position: u64, message: String) {
        self.bar.set_position(position);
        if self.last_line.is_some_and(|at| at.elapsed() >= PLAIN) {
            self.last_line = Some(Instant::now());
            let left = self.bar.eta().as_secs();
            eprintln!("{what} {position}/{}  {message}  {left} s left", self.bar.length().unwrap_or(0));
        }
        self.bar.set_message(message);
    }

    /// A line that stays, above the bar.
    pub fn note(&self, line: &str) {
        if !self.quiet {
            self.bar.suspend(|| eprintln!("{line}"));
        }
    }

    /// Takes the bar away.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// From here on the first Ctrl-C (or termination signal) only makes [`interrupted`] true; the second ends the program.
///
/// # Errors
/// When the system refuses the handler.
pub fn catch_interrupts() -> Result<()> {
    ctrlc::set_handler(|| {
        if INTERRUPTED.swap(true, Ordering::Relaxed) {
            std::process::exit(130); // 128 + SIGINT, as shells report it
        }
    })
    .map_err(|e| Error::new(format!("cannot catch Ctrl-C: {e}")))
}

/// As if Ctrl-C had been pressed once: every run of this program saves a checkpoint and ends.
pub fn interrupt() {
    INTERRUPTED.store(true, Ordering::Relaxed);
}

/// Whether Ctrl-C was pressed.
pub fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hidden_bar_counts_and_quiet_prints_no_lines() {
        let mut progress = Progress::new(10, 4, true);
        assert!(progress.last_line.is_none());
        progress.step(5, 1.0, 0.1, 100.0);
        assert_eq!(progress.bar.position(), 5);
        assert_eq!(progress.bar.message(), "loss 1.0000  lr 1.00e-1  100 tokens/s");
        progress.finish();
    }
}
