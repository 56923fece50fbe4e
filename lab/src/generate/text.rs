//! Text that is shown while it grows. Not here: how tokens become text (tokens.rs).

use crate::tokens::Tokenizer;

/// A text that grows token by token and ends before the first of some strings.
pub struct Output<'a> {
    stops: &'a [String],
    tokenizer: &'a Tokenizer,
    /// The tokens before, as many as the text of the next can depend on.
    before: Vec<u32>,
    /// Bytes that are not given out yet: they may turn out to begin a stop string, or are the beginning of a character.
    held: Vec<u8>,
    stopped: bool,
}

impl<'a> Output<'a> {
    /// An empty text.
    pub fn new(stops: &'a [String], tokenizer: &'a Tokenizer) -> Self {
        Self { stops, tokenizer, before: Vec::new(), held: Vec::new(), stopped: false }
    }

    /// Whether a stop string has come.
    pub fn stopped(&self) -> bool {
        self.stopped
    }

    /// Adds a token; returns what is certain by now, in whole characters. Bytes that are no UTF-8 become U+FFFD.
    pub fn push(&mut self, token: u32) -> String {
        self.held.extend(self.tokenizer.decode_next(&self.before, token));
        self.before.push(token);
        self.before.drain(..self.before.len().saturating_sub(8));
        let find = |stop: &String| self.held.windows(stop.len()).position(|at| at == stop.as_bytes());
        if let Some(at) = self.stops.iter().filter_map(find).min() {
            self.held.truncate(at);
            self.stopped = true;
            return self.finish();
        }
        // the longest end that begins a stop string
        let begins = |&len: &usize| {
            let end = &self.held[self.held.len() - len..];
            self.stops.iter().any(|stop| stop.as_bytes().starts_with(end))
        };
        let suspect = (1..=self.held.len()).rev().find(begins).unwrap_or(0);
        let mut ready = self.held.len() - suspect;
        if let Some(last) = self.held[..ready].utf8_chunks().last() {
            let cut = last.invalid();
            if std::str::from_utf8(cut).is_err_and(|e| e.error_len().is_none()) {
                ready -= cut.len();
            }
        }
        let text = String::from_utf8_lossy(&self.held[..ready]).into_owned();
        self.held.drain(..ready);
        text
    }

    /// What was held back, now that nothing more comes.
    pub fn finish(&mut self) -> String {
        String::from_utf8_lossy(&std::mem::take(&mut self.held)).into_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The pieces in which `bytes` come out, the last by `finish`, and whether they were stopped.
    fn pieces(bytes: &[u8], stops: &[&str]) -> (Vec<String>, bool) {
        let stops: Vec<String> = stops.iter().map(|s| s.to_string()).collect();
        let mut output = Output::new(&stops, &Tokenizer::Bytes);
        let mut pieces = Vec::new();
        for &byte in bytes {
            pieces.push(output.push(byte.into()));
            if output.stopped() {
                return (pieces, true);
            }
        }
        pieces.push(output.finish());
        (pieces, false)
    }

    #[test]
    fn characters_come_whole() {
        let (shown, _) = pieces("aé€𝄞".as_bytes(), &[]);
        assert_eq!(shown, ["a", "", "é", "", "", "€", "", "", "", "𝄞", ""]);
        // a stray continuation, a start without its rest before an ASCII byte, a start at the very end
        let bytes = [b'a', 0x80, 0xe2, 0x82, b'b', 0xc3];
        let (shown, _) = pieces(&bytes, &[]);
        assert_eq!(shown.concat(), String::from_utf8_lossy(&bytes));
        assert_eq!(shown, ["a", "\u{fffd}", "", "", "\u{fffd}b", "", "\u{fffd}"]);
    }

    #[test]
    fn the_text_ends_before_the_first_stop_string() {
        let (shown, stopped) = pieces(b"one END", &["END", "\n\n"]);
        assert_eq!((shown.concat().as_str(), stopped), ("one ", true));
        // what might begin one is held, and let go when it does not
        let (shown, stopped) = pieces(b"aENEx", &["END"]);
        assert_eq!(shown, ["a", "", "", "EN", "Ex", ""]);
        assert!(!stopped);
        let (shown, _) = pieces(b"xEN", &["END"]);
        assert_eq!(shown, ["x", "", "", "EN"]);
        // of two that have come, the earlier; one within a character's bytes or across characters
        assert_eq!(pieces(b"abcd", &["bcd", "cd"]).0.concat(), "a");
        let (shown, stopped) = pieces("né – da".as_bytes(), &["é –"]);
        assert_eq!((shown.concat().as_str(), stopped), ("n", true));
        assert_eq!(pieces("ab".as_bytes(), &["a"]), (vec![String::new()], true));
    }
}
