//! `rankgrad`: train, evaluate, sample and inspect native low-rank language models.
//!
//! Reading order: model, methods (who moves it), trainer (one step), train (the loop), workers (many at it); guide, flops; config, cli, data, tokens (words),
//! checkpoint, run, tensorboard, progress, plot around it; generate, inspect, export and bench use what was trained; import brings models in,
//! ranks changes their ranks; study/ compares many runs, report/ shows them, runs lists them; pack makes token files (shards) of text.
//! Here: one function call per command, and one place where an error reaches the person.

mod bench;
mod checkpoint;
mod cli;
mod config;
mod data;
mod device;
mod error;
mod export;
mod files;
mod flops;
mod generate;
mod guide;
mod import;
mod inspect;
mod methods;
mod model;
mod pack;
mod plot;
mod progress;
mod ranks;
mod report;
mod run;
mod runs;
mod shards;
mod study;
mod tensorboard;
mod tokens;
mod train;
mod trainer;
#[cfg(feature = "tokenizers")]
mod words;
mod workers;

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::Parser;
use rankgrad::tensor::Backend;

use crate::cli::{Cli, Command, DataCommand, TokenizerCommand};
use crate::error::Result;

fn main() -> ExitCode {
    let command = Cli::parse().command;
    match device::caught(|| run(command)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<()> {
    match command {
        Command::Train(args) => train::train(&args),
        Command::Eval(args) => inspect::eval(&args),
        Command::Generate(args) => generate::generate(&args),
        Command::Inspect(args) => inspect::inspect(&args),
        Command::Export(args) => export::export(&args),
        Command::Import(args) => import::import(&args),
        Command::Rank(args) => ranks::rank(&args),
        Command::Merge(args) => ranks::merge(&args),
        Command::Bench(args) => bench::bench(&args),
        Command::Study(args) => study::study(&args),
        Command::Report(args) => report::report(&args),
        Command::Runs(args) => runs::runs(&args),
        Command::Tokenizer(TokenizerCommand::Train(args)) => tokens::train(&args),
        Command::Data(DataCommand::Pack(args)) => pack::pack(&args),
        Command::Devices => device::devices(),
    }
}

/// Worker threads (0: as many as there are cores). Work runs inside, so that no op has to cross over from another thread.
///
/// # Errors
/// More than 64 for each core, at which nothing moves any more; a system that has no more.
fn pool(threads: usize) -> Result<rayon::ThreadPool> {
    let most = 64 * std::thread::available_parallelism().map_or(1, usize::from);
    if threads > most {
        return Err(error::Error::new(format!(
            "--threads {threads}: at most {most} here; 0 is one for each core"
        )));
    }
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
    pool.build().map_err(|e| error::Error::new(format!("cannot start {threads} worker threads: {e}")))
}

/// Does `work`, and keeps the pool's other threads looking for some meanwhile: for ops that come one after the other and are each shared
/// among threads. Those that decode a token take tens of microseconds, and a thread that went to sleep between two takes as long to wake up.
fn awake<B: Backend, R>(work: impl FnOnce() -> R) -> R {
    struct Over(Arc<AtomicBool>);
    impl Drop for Over {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Release); // after a panic, too
        }
    }
    let shares = !B::ASYNCHRONOUS && rayon::current_num_threads() > 1;
    let Some(me) = rayon::current_thread_index().filter(|_| shares) else { return work() };
    let over = Over(Arc::default());
    let seen = over.0.clone();
    rayon::spawn_broadcast(move |thread| {
        // this thread gets here when it waits for others: it must not stay
        while thread.index() != me && !seen.load(Ordering::Acquire) {
            if rayon::yield_now() != Some(rayon::Yield::Executed) {
                std::thread::yield_now(); // to other programs, where cores are fewer than threads
            }
        }
    });
    work()
}
