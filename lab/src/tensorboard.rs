//! `--tensorboard`: the records of a run as scalars in TensorBoard's event files, beside metrics.jsonl.
//!
//! A file is a row of framed protobuf messages (TFRecord: length, its checksum, message, its checksum), of which a scalar needs six
//! fields; what writes all of protobuf would be many times this. Each start of a run begins a file of its own: TensorBoard reads them
//! in the order of their names, and where one begins with a start (`SessionLog`) at step s, forgets what earlier ones said of s and
//! later steps, as a resumed run does. Not here: reading such files, and anything but scalars.
//! Sources: tensorflow/core/util/event.proto, tensorflow/core/framework/summary.proto, tensorflow/core/lib/io/record_writer.cc.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crc::{CRC_32_ISCSI, Crc};

use crate::error::{Result, cannot};
use crate::run::Record;

/// What TensorBoard looks for in a file's name.
const PREFIX: &str = "events.out.tfevents.";
/// The format's, "Castagnoli's".
const CRC32C: Crc<u32> = Crc::<u32>::new(&CRC_32_ISCSI);

/// An open event file.
pub struct Events {
    file: File,
    path: PathBuf,
}

/// Whether a run's directory has event files.
///
/// # Errors
/// A directory that cannot be listed.
pub fn exist(directory: &Path) -> Result<bool> {
    Ok(!list(directory)?.is_empty())
}

/// The names of the event files, in TensorBoard's order.
fn list(directory: &Path) -> Result<Vec<String>> {
    let entries = fs::read_dir(directory).map_err(cannot("list", directory))?;
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let mut names: Vec<String> = names.filter(|name| name.starts_with(PREFIX)).collect();
    names.sort();
    Ok(names)
}

impl Events {
    /// Begins a file for the steps after those of `kept`, the run's records so far; these go into it as well if none is there that
    /// has them.
    ///
    /// # Errors
    /// A directory that cannot be written.
    pub fn open(directory: &Path, kept: &[Record]) -> Result<Self> {
        let earlier = list(directory)?;
        let time = |name: &String| name[PREFIX.len()..].split('.').next()?.parse::<u64>().ok();
        // after those that are there, whatever a clock says
        let seconds = earlier.iter().filter_map(time).max().map_or(0, |last| last + 1).max(now() as u64);
        let path = directory.join(format!("{PREFIX}{seconds:010}.rankgrad"));
        let file = OpenOptions::new().create_new(true).append(true).open(&path);
        let mut events = Events { file: file.map_err(cannot("write", &path))?, path };
        events.write(0, &field(3, b"brain.Event:2"))?;
        let done = kept.last().map_or(0, |record| record.step);
        let before: &[Record] = if earlier.is_empty() { kept } else { &[] };
        let start = before.first().map_or(done + 1, |record| record.step);
        events.write(start, &field(7, &[1 << 3, 1]))?; // SessionLog { status: START }
        before.iter().try_for_each(|record| events.log(record))?;
        Ok(events)
    }

    /// Adds a record. What is not finite is left out.
    ///
    /// # Errors
    /// A full disk and the like.
    pub fn log(&mut self, record: &Record) -> Result<()> {
        let mut values = vec![
            ("loss/training".to_owned(), record.loss),
            ("loss/validation".to_owned(), record.val_loss),
            ("step/learning_rate".to_owned(), Some(record.lr)),
            ("step/gradient_norm".to_owned(), record.grad_norm),
            ("step/tokens".to_owned(), Some(record.tokens as f64)),
            ("step/tokens_per_second".to_owned(), Some(record.tokens_per_second)),
        ];
        for (name, quantities) in record.telemetry.numbers() {
            values
                .extend(quantities.into_iter().map(|(quantity, x)| (format!("{quantity}/{name}"), Some(x))));
        }
        self.scalars(record.step, &values)
    }

    /// Adds scalars of one step.
    ///
    /// # Errors
    /// A full disk and the like.
    pub fn scalars(&mut self, step: u64, values: &[(String, Option<f64>)]) -> Result<()> {
        let value = |(tag, value): &(String, Option<f64>)| {
            let value = (*value)? as f32;
            // Summary { value: [Value { tag, simple_value }] }
            let mut message = field(1, tag.as_bytes());
            message.push((2 << 3) | 5);
            message.extend(value.to_le_bytes());
            Some(field(1, &message))
        };
        let summary: Vec<u8> = values.iter().filter_map(value).flatten().collect();
        self.write(step, &field(5, &summary))
    }

    /// Appends Event { wall_time, step, and `what` }, in one write: a crash cuts off the last event at most.
    fn write(&mut self, step: u64, what: &[u8]) -> Result<()> {
        let mut event = vec![(1 << 3) | 1];
        event.extend(now().to_le_bytes());
        event.push(2 << 3);
        event.extend(varint(step));
        event.extend(what);
        self.file.write_all(&framed(&event)).map_err(cannot("write", &self.path))
    }
}

/// A message in its frame.
fn framed(message: &[u8]) -> Vec<u8> {
    let masked =
        |bytes: &[u8]| CRC32C.checksum(bytes).rotate_right(15).wrapping_add(0xa282_ead8).to_le_bytes();
    let length = (message.len() as u64).to_le_bytes();
    [&length[..], &masked(&length), message, &masked(message)].concat()
}

/// A field of bytes: text, or a message.
fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
    let mut field = vec![(number << 3) | 2];
    field.extend(varint(bytes.len() as u64));
    field.extend(bytes);
    field
}

/// Seven bits a byte, the lowest first; the eighth says that more follow.
fn varint(mut x: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while x >= 0x80 {
        bytes.push(x as u8 | 0x80);
        x >>= 7;
    }
    bytes.push(x as u8);
    bytes
}

/// Seconds since 1970.
fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64())
}
