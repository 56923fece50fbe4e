//! CUDA graphs: what is asked of a GPU again and again is launched as a whole, one call of the host's for many kernels.
//!
//! Work is written down instead of being enqueued, as a stretch, until somebody waits for the device or the stretch is full. One that comes
//! for the first time is enqueued piece by piece. The second time it is captured into a graph; from then on the graph is launched, after
//! what differs has been set in it: arguments of kernels, such as learning rates and addresses, and bytes of the host's. So a training step
//! is a dozen graphs, no number of it need live on the device, and nothing is assumed of steps: a stretch is looked up by everything that a
//! graph fixes, and work that never comes again is done as without graphs. The same kernels run in the same order, to the same bits.
//!
//! Not here: the calls that enqueue a piece (cuda.rs).

use super::cuda::{Gpu, Refused};
use super::executor::{Address, Arg, Launch, pointers};
use super::plans::Shape;
use cudarc::driver::{CudaGraph, result, sys};
use std::collections::HashMap;
use std::fmt::{self, Debug, Display, Formatter};
use std::ops::Range;

/// In the environment, 1 turns graphs on for every GPU that is opened.
pub(super) const SWITCH: &str = "RANKGRAD_CUDA_GRAPHS";

/// A full stretch: the first after a wait is short, since the device is idle while it is written, and each other twice as long as that before.
const FIRST: usize = 32;
const LONGEST: usize = 128;
/// Fewer pieces are not worth a graph.
const SHORTEST: usize = 4;
/// Stretches that are known at one time. Beyond that, all are forgotten: what comes does not come again.
const KNOWN: usize = 4096;

/// A piece of work. Arguments of a kernel and bytes of an upload go beside it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Work {
    Upload {
        to: Address,
        bytes: usize,
    },
    Copy {
        from: Address,
        to: Address,
        bytes: usize,
    },
    Zero {
        at: Address,
        bytes: usize,
    },
    Launch {
        launch: Launch,
        args: usize,
    },
    /// A single product. Its plan is made before.
    Product {
        shape: Shape,
        add: bool,
        operands: [Address; 3],
    },
    /// `table`: addresses, on the device, first of all A, then of all B, then of all C.
    Batch {
        shape: Shape,
        add: bool,
        count: usize,
        table: Address,
    },
}

/// Work that is written down.
#[derive(Debug, Default)]
struct Stretch {
    work: Vec<Work>,
    /// Of its kernels, one after the other.
    args: Vec<Arg>,
    /// Of its uploads.
    bytes: Vec<u8>,
}

impl Stretch {
    fn clear(&mut self) {
        self.work.clear();
        self.args.clear();
        self.bytes.clear();
    }

    /// Each piece with where its arguments and its bytes are.
    fn pieces(&self) -> impl Iterator<Item = (Work, Range<usize>, Range<usize>)> {
        let [mut args, mut bytes] = [0; 2];
        self.work.iter().map(move |&work| {
            let [first_arg, first_byte] = [args, bytes];
            match work {
                Work::Launch { args: count, .. } => args += count,
                Work::Upload { bytes: count, .. } => bytes += count,
                _ => {}
            }
            (work, first_arg..args, first_byte..bytes)
        })
    }
}

/// What is known of a stretch.
#[derive(Debug)]
enum Known {
    /// That it came.
    Once,
    Graph(Graph),
    /// That it cannot be captured.
    Unfit,
}

/// A stretch, captured.
struct Graph {
    graph: CudaGraph,
    /// Of its kernels, in order.
    nodes: Vec<sys::CUgraphNode>,
    /// The arguments that they have in it.
    args: Vec<Arg>,
    /// Where on the device its uploads are copied from: nothing, if there are none.
    staging: Option<Address>,
}
// SAFETY: the driver's graphs belong to no thread; a mutex has them used by one at a time
unsafe impl Send for Graph {}

impl Debug for Graph {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.debug_struct("Graph").field("kernels", &self.nodes.len()).finish_non_exhaustive()
    }
}

/// What graphs did so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GraphUse {
    /// Graphs captured.
    pub captured: usize,
    /// Graphs launched.
    pub launched: usize,
    /// Pieces of work, such as kernels, in those.
    pub replayed: usize,
    /// Pieces that were enqueued one by one.
    pub single: usize,
    /// Arguments of kernels that were set anew, counted by kernels.
    pub changed: usize,
}

impl Display for GraphUse {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Self { captured, launched, replayed, single, changed } = *self;
        let pieces = replayed + single;
        write!(
            f,
            "{captured} captured, {launched} launched; {replayed} of {pieces} pieces of work in them, {changed} with other arguments"
        )
    }
}

/// What is written down, and what is known.
#[derive(Debug)]
pub(super) struct Graphs {
    stretch: Stretch,
    /// Pieces at which the stretch is full.
    full: usize,
    known: HashMap<Vec<Work>, Known>,
    /// Somebody takes the times of kernels, which a graph hides.
    pub paused: bool,
    pub seen: GraphUse,
}

impl Default for Graphs {
    fn default() -> Self {
        Self {
            stretch: Stretch::default(),
            full: FIRST,
            known: HashMap::new(),
            paused: false,
            seen: GraphUse::default(),
        }
    }
}

/// Whether the driver is new enough.
pub(super) fn supported() -> bool {
    // SAFETY: only looked for; devices() has opened the driver before
    unsafe { sys::culib().get::<unsafe extern "C" fn()>(b"cuStreamGetCaptureInfo_v3\0").is_ok() }
}

impl Graphs {
    /// Writes a piece down, and enqueues all if that makes enough.
    ///
    /// # Safety
    /// That of the work: its addresses must be what it takes them for, now and in the order in which work is put.
    pub unsafe fn put(&mut self, gpu: &Gpu, work: Work, args: &[Arg], bytes: &[u8]) {
        self.stretch.work.push(work);
        self.stretch.args.extend_from_slice(args);
        self.stretch.bytes.extend_from_slice(bytes);
        if self.stretch.work.len() == self.full {
            self.play(gpu);
            self.full = (2 * self.full).min(LONGEST);
        }
    }

    /// Enqueues what is written down, for somebody to wait for it.
    pub fn flush(&mut self, gpu: &Gpu) {
        self.play(gpu);
        self.full = FIRST;
    }

    fn play(&mut self, gpu: &Gpu) {
        let pieces = self.stretch.work.len();
        if pieces == 0 {
            return;
        }
        let mut stretch = std::mem::take(&mut self.stretch); // whatever fails below is not done again
        gpu.enter();
        let mut known = self.known.get_mut(&stretch.work[..]);
        if let Some(known @ Known::Once) = &mut known
            && pieces >= SHORTEST
        {
            **known = capture(gpu, &stretch).map_or(Known::Unfit, Known::Graph);
            self.seen.captured += usize::from(matches!(known, Known::Graph(_)));
        }
        match known {
            Some(Known::Graph(graph)) => {
                self.seen.changed += gpu.must(graph.replay(gpu, &stretch));
                self.seen.launched += 1;
                self.seen.replayed += pieces;
            }
            known => {
                let new = known.is_none();
                for (work, args, bytes) in stretch.pieces() {
                    // SAFETY: who put it has promised
                    gpu.must(unsafe { gpu.enqueue(work, &stretch.args[args], &stretch.bytes[bytes]) });
                }
                self.seen.single += pieces;
                if new && self.known.len() >= KNOWN {
                    self.forget(gpu);
                }
                if new {
                    self.known.insert(stretch.work.clone(), Known::Once);
                }
            }
        }
        stretch.clear();
        self.stretch = stretch; // for its room
    }

    /// Gives up all graphs.
    pub fn forget(&mut self, gpu: &Gpu) {
        for known in std::mem::take(&mut self.known).into_values() {
            if let Known::Graph(Graph { graph, staging, .. }) = known {
                drop(graph);
                if let Some(address) = staging {
                    // SAFETY: the graph was the only user, and what it has launched comes before
                    unsafe { gpu.give_up(address) };
                }
            }
        }
    }
}

/// Captures a stretch. Nothing of it is done by that.
///
/// # Errors
/// What the driver says; nothing is being captured then.
fn capture(gpu: &Gpu, stretch: &Stretch) -> Result<Graph, Refused> {
    let staging = match stretch.bytes.len() {
        0 => None,
        bytes => Some(gpu.find(bytes)?),
    };
    let begun = gpu.stream.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED);
    let nodes = begun.map_err(Refused::of("capturing")).and_then(|()| nodes(gpu, stretch, staging));
    let graph = gpu.stream.end_capture(sys::CUgraphInstantiate_flags(0)).map_err(Refused::of("capturing"));
    let nothing = || Refused::of("capturing")("no graph");
    let made = nodes.and_then(|nodes| Ok((nodes, graph?.ok_or_else(nothing)?)));
    match made {
        Ok((nodes, graph)) => Ok(Graph { graph, nodes, args: stretch.args.clone(), staging }),
        Err(why) => {
            if let Some(address) = staging {
                // SAFETY: there is no graph that uses it
                unsafe { gpu.give_up(address) };
            }
            Err(why)
        }
    }
}

/// Enqueues a stretch while its stream is captured, with uploads from the device's memory `staging`; the nodes of its kernels.
fn nodes(gpu: &Gpu, stretch: &Stretch, staging: Option<Address>) -> Result<Vec<sys::CUgraphNode>, Refused> {
    let mut nodes = Vec::new();
    for (work, args, from) in stretch.pieces() {
        let work = match work {
            Work::Upload { to, bytes } => {
                let staging = staging.expect("there are bytes to upload");
                Work::Copy { from: staging + from.start as u64, to, bytes }
            }
            work => work,
        };
        // SAFETY: who put it has promised; nothing happens but that the graph grows
        unsafe { gpu.enqueue(work, &stretch.args[args], &[]) }?;
        if let Work::Launch { .. } = work {
            nodes.push(last_node(gpu)?);
        }
    }
    Ok(nodes)
}

/// The node that the next work of a stream that is captured would wait for.
fn last_node(gpu: &Gpu) -> Result<sys::CUgraphNode, Refused> {
    let mut status = sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
    let (mut last, mut count) = (std::ptr::null(), 0);
    // SAFETY: numbers and pointers to be written, or null for what is not wanted; the driver keeps the array until the next call
    unsafe {
        use std::ptr::null_mut;
        let stream = gpu.stream.cu_stream();
        let (to_status, to_last, to_count) = (&raw mut status, &raw mut last, &raw mut count);
        sys::cuStreamGetCaptureInfo_v3(
            stream,
            to_status,
            null_mut(),
            null_mut(),
            to_last,
            null_mut(),
            to_count,
        )
        .result()
        .map_err(Refused::of("capturing"))?;
        match count {
            1 => Ok(*last),
            _ => Err(Refused::of("capturing")(format!("{count} nodes are the last"))),
        }
    }
}

impl Graph {
    /// Launches the graph with this stretch's arguments and bytes. How many kernels had others before.
    ///
    /// # Errors
    /// What the driver says.
    fn replay(&mut self, gpu: &Gpu, stretch: &Stretch) -> Result<usize, Refused> {
        if let Some(staging) = self.staging {
            // SAFETY: as long as the stretch's bytes, since the work is the same; graphs launched before come before in the stream
            unsafe { result::memcpy_htod_async(staging, &stretch.bytes, gpu.stream.cu_stream()) }
                .map_err(Refused::of("upload"))?;
        }
        let mut changed = 0;
        let mut nodes = self.nodes.iter();
        for (work, range, _) in stretch.pieces() {
            let Work::Launch { launch, .. } = work else { continue };
            let node = *nodes.next().expect("a node for each kernel");
            let args = &stretch.args[range.clone()];
            if self.args[range.clone()] == *args {
                continue;
            }
            let Launch { kernel, grid: [x, y, z], threads, shared, .. } = launch;
            let mut addresses = pointers(args);
            let params = sys::CUDA_KERNEL_NODE_PARAMS {
                func: gpu.function(&launch).cu_function(),
                gridDimX: x,
                gridDimY: y,
                gridDimZ: z,
                blockDimX: threads,
                blockDimY: 1,
                blockDimZ: 1,
                sharedMemBytes: shared,
                kernelParams: addresses.as_mut_ptr(),
                extra: std::ptr::null_mut(),
                kern: std::ptr::null_mut(),
                ctx: std::ptr::null_mut(),
            };
            // SAFETY: a node of this graph, with its own kernel and as many arguments, which are copied; launches before keep theirs
            unsafe {
                sys::cuGraphExecKernelNodeSetParams_v2(self.graph.cu_graph_exec(), node, &raw const params)
            }
            .result()
            .map_err(Refused::of(kernel))?;
            self.args[range].copy_from_slice(args);
            changed += 1;
        }
        self.graph.launch().map_err(Refused::of("a graph"))?;
        Ok(changed)
    }
}
