//! How the hosts of the workers speak with each other: a star, all of whose lines lead to worker 0. What goes over a line is bytes,
//! or the news that somebody has failed, so that nobody waits for one who will not come.
//!
//! Here: the star, and lines between threads of this process. Lines over TCP are in tcp.rs.

use std::fmt;
use std::io;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::sync::{Arc, Mutex, MutexGuard};

/// The work in common is over: a worker has failed, or cannot be reached. A sentence that says which and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failed(pub String);

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Failed {}

/// One worker's way to the others, on the host.
pub trait Link: Send + Sync {
    /// This worker's number, from 0.
    fn worker(&self) -> usize;
    /// How many workers there are.
    fn workers(&self) -> usize;
    /// Called by all workers together: worker 0 hears what each says, in the order of their numbers, and its `answer` goes to all.
    /// (The others' `answer` is not called.)
    ///
    /// # Errors
    /// A worker has failed or cannot be reached.
    fn exchange(
        &self,
        mine: Vec<u8>,
        answer: &mut dyn FnMut(Vec<Vec<u8>>) -> Vec<u8>,
    ) -> Result<Vec<u8>, Failed>;
    /// Tells the others that this worker will not go on: their exchanges, also those that wait already, end with an error.
    fn fail(&self, why: &str);
    /// Whether another has failed, without waiting. For those who wait elsewhere, such as for a GPU.
    fn failure(&self) -> Option<Failed>;
}

impl dyn Link + '_ {
    /// The sums of the workers' numbers.
    ///
    /// # Errors
    /// As for [`Link::exchange`].
    pub fn sums<const N: usize>(&self, mine: [f64; N]) -> Result<[f64; N], Failed> {
        let read = |bytes: &[u8]| -> Vec<f64> {
            bytes.as_chunks().0.iter().copied().map(f64::from_le_bytes).collect()
        };
        let mine = mine.into_iter().flat_map(f64::to_le_bytes).collect();
        let sums = self.exchange(mine, &mut |parts| {
            let parts: Vec<Vec<f64>> = parts.iter().map(|part| read(part)).collect();
            (0..N).flat_map(|i| parts.iter().map(|part| part[i]).sum::<f64>().to_le_bytes()).collect()
        })?;
        Ok(read(&sums).try_into().expect("N of them"))
    }
}

/// What goes over a line: bytes, or why there will be no more.
pub(super) type Message = Result<Vec<u8>, String>;

/// A line between two workers.
pub(super) trait Line: Send {
    fn send(&mut self, message: &Message) -> io::Result<()>;
    /// Waits for the next message.
    fn receive(&mut self) -> io::Result<Message>;
    /// What has gone wrong at the other end already, without waiting.
    fn failure(&mut self) -> Option<String>;
}

/// The lines of one worker: worker 0 has one to each of the others, in their order, they have one to it.
pub(super) struct Star<L> {
    worker: usize,
    workers: usize,
    inner: Mutex<Lines<L>>,
}

struct Lines<L> {
    lines: Vec<L>,
    /// The first failure that became known here.
    failed: Option<Failed>,
}

impl<L: Line> Lines<L> {
    /// Keeps the first failure, and passes it on to all: worker 0 to those who have not heard of it.
    fn end(&mut self, why: Failed) {
        let why = self.failed.get_or_insert(why);
        for line in &mut self.lines {
            line.send(&Err(why.0.clone())).ok(); // who is gone need not be told
        }
    }
}

impl<L: Line> Star<L> {
    pub(super) fn new(worker: usize, workers: usize, lines: Vec<L>) -> Self {
        Self { worker, workers, inner: Mutex::new(Lines { lines, failed: None }) }
    }

    fn lines(&self) -> MutexGuard<'_, Lines<L>> {
        self.inner.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// The number of the worker at the other end of line `i`.
    fn peer(&self, i: usize) -> usize {
        if self.worker == 0 { i + 1 } else { 0 }
    }

    /// Receives from line `i`.
    fn hear(&self, line: &mut L, i: usize) -> Result<Vec<u8>, Failed> {
        match line.receive() {
            Ok(message) => message.map_err(Failed),
            Err(error) => Err(Failed(format!("worker {} cannot be reached: {error}", self.peer(i)))),
        }
    }

    fn tell(&self, line: &mut L, i: usize, message: &Message) -> Result<(), Failed> {
        // one that has failed has said why before it hung up
        line.send(message).map_err(|error| match self.hear(line, i) {
            Err(why) => why,
            Ok(_) => Failed(format!("worker {} cannot be reached: {error}", self.peer(i))),
        })
    }
}

impl<L: Line> Link for Star<L> {
    fn worker(&self) -> usize {
        self.worker
    }

    fn workers(&self) -> usize {
        self.workers
    }

    fn exchange(
        &self,
        mine: Vec<u8>,
        answer: &mut dyn FnMut(Vec<Vec<u8>>) -> Vec<u8>,
    ) -> Result<Vec<u8>, Failed> {
        let mut inner = self.lines();
        let Lines { lines, failed } = &mut *inner;
        if let Some(failed) = failed {
            return Err(failed.clone());
        }
        let round = || {
            if self.worker > 0 {
                self.tell(&mut lines[0], 0, &Ok(mine))?;
                return self.hear(&mut lines[0], 0);
            }
            let mut parts = vec![mine];
            for (i, line) in lines.iter_mut().enumerate() {
                parts.push(self.hear(line, i)?);
            }
            let answer = Ok(answer(parts));
            for (i, line) in lines.iter_mut().enumerate() {
                self.tell(line, i, &answer)?;
            }
            answer.map_err(Failed)
        };
        let outcome = round();
        if let Err(why) = &outcome {
            inner.end(why.clone());
        }
        outcome
    }

    fn fail(&self, why: &str) {
        self.lines().end(Failed(format!("worker {} failed: {why}", self.worker)));
    }

    fn failure(&self) -> Option<Failed> {
        let mut inner = self.lines();
        if inner.failed.is_none()
            && let Some(why) = inner.lines.iter_mut().find_map(L::failure)
        {
            inner.end(Failed(why));
        }
        inner.failed.clone()
    }
}

/// A line between two threads.
struct Channel {
    to: Sender<Message>,
    from: Receiver<Message>,
    /// Came while nobody waited for it.
    early: Option<Message>,
}

/// The links of so many workers that are threads of this process.
pub fn threads(workers: usize) -> Vec<Arc<dyn Link>> {
    let line = |_| {
        let ((to, there), (back, from)) = (channel(), channel());
        (Channel { to, from, early: None }, Channel { to: back, from: there, early: None })
    };
    let (hub, others): (Vec<Channel>, Vec<Channel>) = (1..workers).map(line).unzip();
    let others = others.into_iter().enumerate().map(|(i, line)| (i + 1, vec![line]));
    let all = std::iter::once((0, hub)).chain(others);
    all.map(|(worker, lines)| Arc::new(Star::new(worker, workers, lines)) as Arc<dyn Link>).collect()
}

impl Line for Channel {
    fn send(&mut self, message: &Message) -> io::Result<()> {
        self.to.send(message.clone()).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }

    fn receive(&mut self) -> io::Result<Message> {
        let early = self.early.take();
        early.map_or_else(|| self.from.recv().map_err(|_| io::ErrorKind::BrokenPipe.into()), Ok)
    }

    fn failure(&mut self) -> Option<String> {
        if self.early.is_none() {
            match self.from.try_recv() {
                Ok(message) => self.early = Some(message),
                Err(TryRecvError::Empty) => {}
                Err(TryRecvError::Disconnected) => return Some("a worker has ended early".into()),
            }
        }
        self.early.as_ref()?.as_ref().err().cloned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What each of the workers makes of its link, at the same time.
    fn each<T: Send>(links: Vec<Arc<dyn Link>>, f: impl Fn(&dyn Link) -> T + Sync) -> Vec<T> {
        std::thread::scope(|scope| {
            let f = &f;
            let workers: Vec<_> = links.into_iter().map(|link| scope.spawn(move || f(&*link))).collect();
            workers.into_iter().map(|worker| worker.join().unwrap()).collect()
        })
    }

    #[test]
    fn worker_0_hears_all_in_order_and_answers() {
        let heard = each(threads(4), |link| {
            let mine = vec![link.worker() as u8; link.worker()];
            let joined = link.exchange(mine, &mut |parts| parts.concat()).unwrap();
            assert!(link.sums([1.0, link.worker() as f64]).unwrap() == [4.0, 6.0]);
            joined
        });
        assert_eq!(heard, vec![vec![1, 2, 2, 3, 3, 3]; 4]);
    }

    #[test]
    fn who_fails_is_known_to_all() {
        for failing in 0..3 {
            let ends = each(threads(3), |link| {
                if link.worker() == failing {
                    link.fail("no more disk");
                    return link.sums([0.0]).unwrap_err();
                }
                // the first may still pass, if the failure came behind what was said before; nobody waits for ever
                let end = (0..3).find_map(|_| link.sums([1.0]).err()).unwrap();
                assert_eq!(link.failure(), Some(end.clone()));
                end
            });
            assert_eq!(ends, vec![Failed(format!("worker {failing} failed: no more disk")); 3]);
        }
    }

    #[test]
    fn a_failure_is_seen_without_waiting() {
        let links = threads(2);
        assert_eq!((links[0].failure(), links[1].failure()), (None, None));
        links[1].fail("x");
        assert_eq!(links[0].failure(), Some(Failed("worker 1 failed: x".into())));
        let [first, second] = threads(2).try_into().ok().unwrap();
        drop(second); // a thread that was lost without a word
        assert!(first.failure().is_some() && first.sums([0.0]).is_err());
    }
}
