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
