//! Gradients that are summed over the workers while the backward goes on to others: as they come, in buckets, since a sum costs
//! its beginning too. (Li et al. 2020, PyTorch Distributed, arXiv 2006.15704, section 3.2.3.)
//!
//! Not here: when a gradient is complete, which the tape says ([`Var::backward_with`](crate::autograd::Var::backward_with)).

use super::{Collective, Failed, Sums};
use crate::tensor::{Backend, Tensor};

/// Tensors on their way, each with a key by which its owner knows it. All workers give theirs in one order.
pub struct Buckets<'a, B: Backend, K> {
    device: B,
    collective: &'a dyn Collective<B>,
    /// A bucket with so many is full.
    bytes: usize,
    /// Not yet under way.
    open: Vec<(K, Tensor<B>)>,
    begun: Vec<(Vec<K>, Sums<'a, B>)>,
    failed: Option<Failed>,
}

impl<'a, B: Backend, K> Buckets<'a, B, K> {
    /// What PyTorch fills a bucket to (`bucket_cap_mb` of its DistributedDataParallel): 25 MiB.
    pub const BYTES: usize = 25 << 20;

    /// Empty buckets for tensors of `device`, of so many bytes.
    pub fn new(device: &B, collective: &'a dyn Collective<B>, bytes: usize) -> Self {
        let (open, begun, failed) = (Vec::new(), Vec::new(), None);
        Self { device: device.clone(), collective, bytes, open, begun, failed }
    }

    /// Takes a tensor, and has those that wait summed if they are enough. A failure is kept for [`Buckets::finish`].
    pub fn add(&mut self, key: K, x: Tensor<B::Wide>) {
        self.open.push((key, x.cast(&self.device))); // like x
        let held = self.open.iter().map(|(_, x)| x.len() * size_of::<B::Elem>()).sum::<usize>();
        if held >= self.bytes {
            self.begin();
        }
    }

    fn begin(&mut self) {
        let (keys, tensors): (Vec<K>, Vec<_>) = std::mem::take(&mut self.open).into_iter().unzip();
        if self.failed.is_some() || tensors.is_empty() {
            return;
        }
        match self.collective.all_reduce(tensors) {
            Ok(sums) => self.begun.push((keys, sums)),
            Err(why) => self.failed = Some(why),
        }
    }

    /// Waits for the sums of all that came, and gives each to `take` with its key.
    ///
    /// # Errors
    /// As for [`Collective::all_reduce`].
    pub fn finish(mut self, mut take: impl FnMut(K, Tensor<B::Wide>)) -> Result<(), Failed> {
        self.begin();
        self.failed.map_or(Ok(()), Err)?;
        for (keys, sums) in self.begun {
            let sums = sums.wait()?;
            let sums = B::widen(&sums.iter().collect::<Vec<_>>()); // like each
            keys.into_iter().zip(sums).for_each(|(key, sum)| take(key, sum));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parallel::{ThroughHost, threads};
    use crate::tensor::Cpu;

    /// What worker `k` has of tensor `i`: [i + 1].
    fn own(k: usize, i: usize) -> Tensor<Cpu<f32>> {
        Tensor::from_fn(&Cpu::default(), [i + 1], |j| (10 * k + i + j) as f32) // [i + 1]
    }

    #[test]
    fn each_sum_comes_back_with_its_key() {
        for bytes in [1, 24, usize::MAX] {
            let worker = |k: usize, link| {
                let collective = ThroughHost(link);
                let mut buckets = Buckets::new(&Cpu::default(), &collective, bytes);
                (0..7).for_each(|i| buckets.add(i, own(k, i)));
                let mut sums = Vec::new();
                buckets.finish(|i, sum| sums.push((i, sum.to_vec()))).map(|()| sums)
            };
            let all: Vec<_> = std::thread::scope(|scope| {
                let worker = &worker;
                let spawn = |(k, link)| scope.spawn(move || worker(k, link));
                let running: Vec<_> = threads(3).into_iter().enumerate().map(spawn).collect();
                running.into_iter().map(|worker| worker.join().unwrap().unwrap()).collect()
            });
            let sum = |i: usize| own(0, i).add(&own(1, i)).add(&own(2, i)).to_vec();
            let right: Vec<_> = (0..7).map(|i| (i, sum(i))).collect();
            assert!(all.iter().all(|sums| *sums == right), "{bytes}: {all:?}");
        }
    }

    #[test]
    fn a_failure_on_the_way_is_told_at_the_end() {
        let [first, second] = threads(2).try_into().ok().unwrap();
        second.fail("no more memory");
        let collective = ThroughHost(first);
        let mut buckets = Buckets::new(&Cpu::default(), &collective, 1);
        (0..3).for_each(|i| buckets.add(i, own(0, i)));
        let end = buckets.finish(|_, _| panic!("there are no sums"));
        assert_eq!(end, Err(Failed("worker 1 failed: no more memory".into())));
    }
}
