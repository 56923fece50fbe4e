//! Several workers that train one model together, by data parallelism: each has the whole model and computes the gradients of its
//! rows of every batch; these are summed over the workers; then each worker updates its part of the matrices, and hands it out.
//!
//! A worker is what MPI, NCCL and torchrun call a rank: that word is taken here. From below: [`Link`], which carries bytes between
//! hosts (link.rs: threads of this process, or TCP), [`Collective`], which sums and hands out tensors ([`ThroughHost`] over any
//! link, gpu/nccl.rs between GPUs), [`Buckets`] (gradients that are summed while others are still computed), [`Division`] (who updates
//! what). [`Alone`] is a single worker, whose tensors nothing touches.
//! Not here: what is exchanged when, which is the training loop's business.

mod buckets;
mod division;
mod link;
mod tcp;

pub use buckets::Buckets;
pub use division::{Division, even_runs};
pub use link::{Failed, Link, threads};
pub use tcp::tcp;

use crate::tensor::{Backend, Tensor};
use std::sync::Arc;

/// What the workers do together with tensors. All of them make the same calls, in one order, with tensors of the same shapes.
pub trait Collective<B: Backend>: Send + Sync {
    /// The way to the other workers' hosts.
    fn link(&self) -> &dyn Link;
    /// Begins to sum each tensor over the workers; the sums have the same bits for every worker. A device may compute meanwhile.
    ///
    /// # Errors
    /// Another worker has failed, or the way to it.
    fn all_reduce(&self, tensors: Vec<Tensor<B>>) -> Result<Sums<'_, B>, Failed>;
    /// Each tensor becomes that of the worker whose number stands beside it.
    ///
    /// # Errors
    /// As for [`Collective::all_reduce`].
    fn broadcast(&self, tensors: Vec<(usize, &mut Tensor<B>)>) -> Result<(), Failed>;
}

/// Tensors that are being summed. Those who drop it wait too: a device may still be writing to them.
pub struct Sums<'a, B: Backend> {
    tensors: Vec<Tensor<B>>,
    /// Waits for the sums; None once that is done.
    rest: Option<Box<dyn FnOnce() -> Result<(), Failed> + 'a>>,
}

impl<'a, B: Backend> Sums<'a, B> {
    /// Those of `tensors`, which are there when `rest` returns.
    pub fn new(tensors: Vec<Tensor<B>>, rest: impl FnOnce() -> Result<(), Failed> + 'a) -> Self {
        Self { tensors, rest: Some(Box::new(rest)) }
    }

    /// The sums, in the order of the tensors.
    ///
    /// # Errors
    /// As for [`Collective::all_reduce`].
    pub fn wait(mut self) -> Result<Vec<Tensor<B>>, Failed> {
        self.rest.take().map_or(Ok(()), |rest| rest())?;
        Ok(std::mem::take(&mut self.tensors))
    }
}

impl<B: Backend> Drop for Sums<'_, B> {
    fn drop(&mut self) {
        self.rest.take().map(|rest| rest().ok());
    }
}

/// The only worker.
#[derive(Clone, Copy, Debug)]
pub struct Alone;

impl Link for Alone {
    fn worker(&self) -> usize {
        0
    }
    fn workers(&self) -> usize {
        1
    }
    fn exchange(
        &self,
        mine: Vec<u8>,
        answer: &mut dyn FnMut(Vec<Vec<u8>>) -> Vec<u8>,
    ) -> Result<Vec<u8>, Failed> {
        Ok(answer(vec![mine]))
    }
    fn fail(&self, _: &str) {}
    fn failure(&self) -> Option<Failed> {
        None
    }
}

impl<B: Backend> Collective<B> for Alone {
    fn link(&self) -> &dyn Link {
        self
    }
    fn all_reduce(&self, tensors: Vec<Tensor<B>>) -> Result<Sums<'_, B>, Failed> {
        Ok(Sums::new(tensors, || Ok(())))
    }
    fn broadcast(&self, _: Vec<(usize, &mut Tensor<B>)>) -> Result<(), Failed> {
        Ok(())
    }
}

/// Tensors by way of the hosts: on any backend and over any link, worker 0 adding up in the order of the workers. Made to be right
/// on every machine, not to be fast: GPUs have NCCL.
pub struct ThroughHost(pub Arc<dyn Link>);

impl<B: Backend<Elem = f32>> Collective<B> for ThroughHost {
    fn link(&self) -> &dyn Link {
        &*self.0
    }

    fn all_reduce(&self, tensors: Vec<Tensor<B>>) -> Result<Sums<'_, B>, Failed> {
        let mine = bytes(&tensors.iter().map(|x| x.to_vec()).collect::<Vec<_>>().concat());
        let add = &mut |parts: Vec<Vec<u8>>| {
            let mut parts = parts.iter();
            let mut sum: Vec<f32> = parts.next().map(|first| floats(first).collect()).unwrap_or_default();
            for part in parts {
                sum.iter_mut().zip(floats(part)).for_each(|(sum, x)| *sum += x);
            }
            bytes(&sum)
        };
        let sums = self.0.exchange(mine, add)?;
        let mut sums = floats(&sums);
        let sum = |x: Tensor<B>| {
            Tensor::from_vec(x.device(), x.shape(), sums.by_ref().take(x.len()).collect()) // like x
        };
        Ok(Sums::new(tensors.into_iter().map(sum).collect(), || Ok(())))
    }

    fn broadcast(&self, tensors: Vec<(usize, &mut Tensor<B>)>) -> Result<(), Failed> {
        let own = tensors.iter().filter(|(owner, _)| *owner == self.0.worker());
        let mine = bytes(&own.map(|(_, x)| x.to_vec()).collect::<Vec<_>>().concat());
        let owned: Vec<(usize, usize)> = tensors.iter().map(|(owner, x)| (*owner, x.len())).collect();
        let in_order = &mut |parts: Vec<Vec<u8>>| {
            let mut parts: Vec<&[u8]> = parts.iter().map(Vec::as_slice).collect();
            let next = |&(owner, len): &(usize, usize)| {
                let (x, rest) = parts[owner].split_at(len * size_of::<f32>());
                parts[owner] = rest;
                x
            };
            owned.iter().map(next).collect::<Vec<_>>().concat()
        };
        let all = self.0.exchange(mine, in_order)?;
        let mut all = floats(&all);
        for (_, x) in tensors {
            *x = Tensor::from_vec(x.device(), x.shape(), all.by_ref().take(x.len()).collect()); // like x
        }
        Ok(())
    }
}

/// What travels: little-endian.
fn bytes(values: &[f32]) -> Vec<u8> {
    let mut bytes = vec![0; size_of_val(values)];
    bytes.as_chunks_mut().0.iter_mut().zip(values).for_each(|(to, x)| *to = x.to_le_bytes());
    bytes
}

fn floats(bytes: &[u8]) -> impl Iterator<Item = f32> {
    bytes.as_chunks().0.iter().copied().map(f32::from_le_bytes)
}
