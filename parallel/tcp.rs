//! Lines over TCP, for workers in several processes, on one machine or on several. Worker 0 listens, the others come to it.
//!
//! Nothing is encrypted, and whoever reaches the port may take a worker's place: for networks that are one's own.
//! A frame is a tag (bytes, or a failure), the length in 8 bytes, and so many bytes; numbers are little-endian.

use super::link::{Failed, Line, Link, Message, Star};
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What a worker says when it comes: this, its number, and how many there are, 4 bytes each.
const HELLO: [u8; 8] = *b"rankgrad";
const BYTES: u8 = 0;
const FAILURE: u8 = 1;
/// How long a worker may keep silent. It may be busy with a validation or a checkpoint meanwhile.
const SILENCE: Duration = Duration::from_secs(30 * 60);
/// Between two tries to reach worker 0, which may not be there yet.
const RETRY: Duration = Duration::from_millis(50);

/// The link of worker `worker` of `workers`, through `host`:`port`, where worker 0 listens.
///
/// # Errors
/// Worker 0 cannot listen there; somebody has not come `within` this time.
pub fn tcp(
    worker: usize,
    workers: usize,
    (host, port): (&str, u16),
    within: Duration,
) -> Result<Arc<dyn Link>, Failed> {
    let until = Instant::now() + within;
    let lines = match worker {
        0 => gather(workers, host, port, until),
        _ => reach(worker, workers, host, port, until).map(|line| vec![line]),
    };
    let seconds = within.as_secs();
    let lines = lines
        .map_err(|why| Failed(format!("worker {worker} of {workers}: {why} (waited up to {seconds} s)")))?;
    Ok(Arc::new(Star::new(worker, workers, lines)))
}

/// Worker 0: waits for the others. Strangers are sent away.
fn gather(workers: usize, host: &str, port: u16, until: Instant) -> Result<Vec<Wire>, String> {
    // on this machine alone, or on all its networks: its name may be an address that only itself has
    let place = if matches!(host, "localhost" | "127.0.0.1") { "127.0.0.1" } else { "0.0.0.0" };
    let cannot =
        |e: io::Error| format!("cannot listen at {place}:{port}: {e}; give a free port in MASTER_PORT");
    let listener = TcpListener::bind((place, port)).map_err(cannot)?;
    listener.set_nonblocking(true).map_err(cannot)?;
    let mut lines: Vec<Option<Wire>> = (1..workers).map(|_| None).collect();
    while let Some(missing) = lines.iter().position(Option::is_none) {
        match listener.accept() {
            Ok((stream, _)) => {
                if let Some((worker, stream)) = welcome(stream, workers, until)
                    && lines[worker - 1].is_none()
                {
                    lines[worker - 1] = Some(stream);
                }
            }
            Err(_) if Instant::now() > until => {
                return Err(format!(
                    "worker {} has not come to {host}:{port}; start it with the same MASTER_ADDR, MASTER_PORT and WORLD_SIZE",
                    missing + 1
                ));
            }
            Err(_) => std::thread::sleep(RETRY),
        }
    }
    Ok(lines.into_iter().flatten().collect())
}

/// Hears who it is, and answers.
fn welcome(mut stream: TcpStream, workers: usize, until: Instant) -> Option<(usize, Wire)> {
    let mut hello = [0; 16];
    stream.set_nonblocking(false).ok()?;
    stream.set_read_timeout(Some(remaining(until).min(Duration::from_secs(5)))).ok()?;
    stream.read_exact(&mut hello).ok()?;
    let number = |at: usize| u32::from_le_bytes(hello[at..at + 4].try_into().expect("4 bytes")) as usize;
    let (worker, of) = (number(8), number(12));
    if hello[..8] != HELLO || of != workers || !(1..workers).contains(&worker) {
        return None;
    }
    stream.write_all(&HELLO).ok()?;
    prepare(&stream).ok()?;
    Some((worker, Wire(stream)))
}

/// Another worker: comes to worker 0.
fn reach(worker: usize, workers: usize, host: &str, port: u16, until: Instant) -> Result<Wire, String> {
    let mut hello = HELLO.to_vec();
    hello.extend([worker, workers].iter().flat_map(|&number| (number as u32).to_le_bytes()));
    let attempt = || -> io::Result<TcpStream> {
        let addresses = (host, port).to_socket_addrs()?;
        let mut last = io::Error::from(io::ErrorKind::NotFound);
        for address in addresses {
            match TcpStream::connect_timeout(&address, remaining(until)) {
                Ok(mut stream) => {
                    stream.set_read_timeout(Some(remaining(until)))?;
                    stream.write_all(&hello)?;
                    let mut answer = HELLO.map(|_| 0);
                    stream.read_exact(&mut answer)?;
                    prepare(&stream)?;
                    return if answer == HELLO { Ok(stream) } else { Err(io::ErrorKind::InvalidData.into()) };
                }
                Err(error) => last = error,
            }
        }
        Err(last)
    };
    loop {
        match attempt() {
            Ok(stream) => return Ok(Wire(stream)),
            Err(error) if Instant::now() > until => {
                return Err(format!(
                    "cannot reach worker 0 at {host}:{port}: {error}; check MASTER_ADDR, MASTER_PORT and WORLD_SIZE"
                ));
            }
            Err(_) => std::thread::sleep(RETRY),
        }
    }
}

/// Not zero, which would mean for ever.
fn remaining(until: Instant) -> Duration {
    until.saturating_duration_since(Instant::now()).max(RETRY)
}

fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?; // small messages are waited for
    stream.set_read_timeout(Some(SILENCE))?;
    stream.set_write_timeout(Some(SILENCE))
}

/// A line between two processes.
struct Wire(TcpStream);

impl Drop for Wire {
    /// Hangs up when the other has too, or after a second: closed with something unread, a connection is reset, and the last words
    /// that it still carried are lost.
    fn drop(&mut self) {
        self.0.shutdown(Shutdown::Write).ok();
        self.0.set_read_timeout(Some(Duration::from_secs(1))).ok();
        io::copy(&mut self.0, &mut io::sink()).ok();
    }
}

impl Line for Wire {
    fn send(&mut self, message: &Message) -> io::Result<()> {
        let (tag, bytes) = match message {
            Ok(bytes) => (BYTES, bytes.as_slice()),
            Err(why) => (FAILURE, why.as_bytes()),
        };
        let mut head = vec![tag];
        head.extend((bytes.len() as u64).to_le_bytes());
        self.0.write_all(&head)?;
        self.0.write_all(bytes)
    }

    fn receive(&mut self) -> io::Result<Message> {
        let mut head = [0; 9];
        self.0.read_exact(&mut head)?;
        let len = u64::from_le_bytes(head[1..].try_into().expect("8 bytes"));
        let mut bytes = Vec::new(); // grows with what comes: a length alone takes no memory
        if Read::by_ref(&mut self.0).take(len).read_to_end(&mut bytes)? as u64 != len {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        match head[0] {
            BYTES => Ok(Ok(bytes)),
            FAILURE => Ok(Err(String::from_utf8_lossy(&bytes).into_owned())),
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    fn failure(&mut self) -> Option<String> {
        let mut tag = [0];
        self.0.set_nonblocking(true).ok()?;
        let seen = self.0.peek(&mut tag);
        self.0.set_nonblocking(false).ok()?;
        match seen {
            Ok(1) if tag == [FAILURE] => self.receive().ok()?.err(),
            Ok(0) => Some("a worker has ended early".into()),
            Ok(_) => None, // bytes that will be asked for
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => None,
            Err(error) => Some(format!("a worker cannot be reached: {error}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A port that was free a moment ago.
    fn port() -> u16 {
        TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
    }

    fn join(worker: usize, workers: usize, port: u16, seconds: u64) -> Result<Arc<dyn Link>, Failed> {
        tcp(worker, workers, ("127.0.0.1", port), Duration::from_secs(seconds))
    }

    #[test]
    fn an_id_of_128_bytes_reaches_all() {
        let port = port();
        let id: Vec<u8> = (0..128).map(|i| i * 2 + 1).collect();
        std::thread::scope(|scope| {
            let workers: Vec<_> = (0..3)
                .rev() // worker 0 last: the others wait for it
                .map(|worker| {
                    let id = &id;
                    std::thread::sleep(Duration::from_millis(100));
                    scope.spawn(move || {
                        let link = join(worker, 3, port, 20).unwrap();
                        assert_eq!((link.worker(), link.workers(), link.failure()), (worker, 3, None));
                        let got = link.exchange(vec![worker as u8], &mut |said| {
                            assert_eq!(said, [[0], [1], [2]]);
                            id.clone()
                        });
                        assert_eq!(&got.unwrap(), id);
                        // much more than a socket holds
                        let sums = link.exchange(vec![worker as u8; 3 << 20], &mut |said| said.concat());
                        assert_eq!(sums.unwrap().len(), 9 << 20);
                        if worker == 2 {
                            link.fail("out of paper");
                        } else {
                            while link.failure().is_none() {
                                std::thread::yield_now();
                                if worker == 0 {
                                    continue;
                                }
                                break; // it hears of it from worker 0
                            }
                            let why = (0..2).find_map(|_| link.sums([0.0]).err());
                            assert_eq!(why, Some(Failed("worker 2 failed: out of paper".into())));
                        }
                    })
                })
                .collect();
            workers.into_iter().for_each(|worker| worker.join().unwrap());
        });
    }

    #[test]
    fn who_does_not_come_is_named_and_strangers_are_sent_away() {
        let port = port();
        std::thread::scope(|scope| {
            let first = scope.spawn(move || join(0, 3, port, 2).err().unwrap());
            scope.spawn(move || join(1, 3, port, 2).unwrap());
            scope.spawn(move || {
                let mut stranger = loop {
                    match TcpStream::connect(("127.0.0.1", port)) {
                        Ok(stream) => break stream,
                        Err(_) => std::thread::sleep(RETRY),
                    }
                };
                stranger.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
                assert_eq!(stranger.read(&mut [0]).unwrap_or(0), 0);
            });
            let Failed(why) = first.join().unwrap();
            assert!(why.starts_with("worker 0 of 3: worker 2 has not come to 127.0.0.1:"), "{why}");
        });
        let Failed(why) = join(1, 2, port, 0).err().unwrap();
        assert!(why.starts_with("worker 1 of 2: cannot reach worker 0 at 127.0.0.1:"), "{why}");
    }
}
