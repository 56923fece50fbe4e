//! Text as token ids and back: each byte an id, or a `tokenizer.json` as Hugging Face's `tokenizers` writes and reads it.
//!
//! Also `tokenizer train`: a byte-level BPE of one's own. A tokenizer's text is kept, since every checkpoint carries it.
//! Not here: files of token ids (shards.rs), or what a corpus does with ids (data.rs).

use std::fs;
use std::path::Path;

use sha2::{Digest, Sha256};

use crate::cli::TokenizerArgs;
use crate::error::{Error, Result, cannot};

/// The token between documents, of a tokenizer that `tokenizer train` makes: GPT-2's.
pub const END: &str = "<|endoftext|>";

/// A mapping between text and token ids.
pub enum Tokenizer {
    /// Byte b is token b.
    Bytes,
    /// A `tokenizer.json`.
    Json(Box<Json>),
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.name())
    }
}

impl Tokenizer {
    /// The tokenizer of a file; None: bytes.
    ///
    /// # Errors
    /// An unreadable file, one that is no tokenizer, or a program built without the feature `tokenizers`.
    pub fn open(path: Option<&Path>) -> Result<Self> {
        let Some(path) = path else { return Ok(Self::Bytes) };
        let text = fs::read_to_string(path).map_err(cannot("read the tokenizer", path))?;
        Self::from_json(text, &path.display().to_string())
    }

    /// The tokenizer that a JSON text describes; `origin` names it in messages.
    ///
    /// # Errors
    /// As [`Tokenizer::open`].
    pub fn from_json(text: String, origin: &str) -> Result<Self> {
        Ok(Self::Json(Box::new(Json::parse(text, origin)?)))
    }

    /// Ids are below this.
    pub fn vocab(&self) -> usize {
        match self {
            Self::Bytes => 256,
            Self::Json(json) => json.vocab(),
        }
    }

    /// The text of its `tokenizer.json`; None: bytes.
    pub fn json(&self) -> Option<&str> {
        match self {
            Self::Bytes => None,
            Self::Json(json) => Some(json.text()),
        }
    }

    /// SHA-256 of [`Tokenizer::json`], in hexadecimal; None: bytes.
    pub fn sha256(&self) -> Option<String> {
        self.json().map(|text| hex(&Sha256::digest(text)))
    }

    /// "bytes", or where the tokenizer came from and its vocabulary.
    pub fn name(&self) -> String {
        match self {
            Self::Bytes => "bytes".into(),
            Self::Json(json) => format!("{} ({} tokens)", json.origin(), json.vocab()),
        }
    }

    /// The token that ends a text, of those that tokenizers usually call so; None for bytes, or if there is none.
    pub fn end(&self) -> Option<u32> {
        match self {
            Self::Bytes => None,
            Self::Json(json) => json.end(),
        }
    }

    /// The ids of a text, without any that mark its beginning or end. `what` names it in messages.
    ///
    /// # Errors
    /// Text that is not UTF-8, other than for bytes; a text that the tokenizer has no tokens for.
    pub fn encode(&self, text: &[u8], what: &str) -> Result<Vec<u32>> {
        match self {
            Self::Bytes => Ok(text.iter().map(|&b| u32::from(b)).collect()),
            Self::Json(json) => json.encode(text, what),
        }
    }

    /// The bytes of a run of tokens: of whole characters, or of parts of them where a token ends inside one. Ids that have no text
    /// (beyond the vocabulary, or special) have no bytes.
    pub fn decode(&self, ids: &[u32]) -> Vec<u8> {
        match self {
            Self::Bytes => ids.iter().filter_map(|&id| u8::try_from(id).ok()).collect(),
            Self::Json(json) => json.decode(ids),
        }
    }

    /// The bytes that `token` adds to the text of the tokens `before` it; for tokenizers whose words do not stand for bytes the last few
    /// of them matter.
    pub fn decode_next(&self, before: &[u32], token: u32) -> Vec<u8> {
        match self {
            Self::Json(json) if !json.spelt_in_bytes() => {
                let text = self.decode(before);
                let longer = self.decode(&[before, &[token]].concat());
                longer.strip_prefix(&text[..]).unwrap_or_default().to_vec()
            }
            _ => self.decode(&[token]),
        }
    }
}

/// A `tokenizer.json`, and what it means.
#[cfg(feature = "tokenizers")]
pub struct Json {
    text: String,
    /// Where it came from, for messages.
    origin: String,
    vocab: usize,
    inner: tokenizers::Tokenizer,
    /// Its tokens are spelt in GPT-2's letters for bytes: the byte of each letter.
    letters: Option<std::collections::HashMap<char, u8>>,
    /// The quick way, if it divides text as GPT-2 does.
    words: Option<crate::words::Words>,
}

#[cfg(feature = "tokenizers")]
impl Json {
    fn parse(text: String, origin: &str) -> Result<Self> {
        let inner: tokenizers::Tokenizer = text.parse().map_err(|e| {
            Error::new(format!("tokenizer {origin}: not a tokenizer.json that this program reads ({e})"))
        })?;
        // the largest id, not the number of ids: some files leave gaps
        let vocab = inner.get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1);
        if vocab == 0 {
            return Err(Error::new(format!("tokenizer {origin}: its vocabulary is empty")));
        }
        let spelt_in_bytes = matches!(inner.get_decoder(), Some(tokenizers::DecoderWrapper::ByteLevel(_)));
        let letters = spelt_in_bytes.then(|| byte_letters().zip(0..=255u8).collect());
        let words = crate::words::Words::of(&inner);
        Ok(Json { text, origin: origin.to_owned(), vocab, inner, letters, words })
    }

    fn text(&self) -> &str {
        &self.text
    }

    fn origin(&self) -> &str {
        &self.origin
    }

    fn vocab(&self) -> usize {
        self.vocab
    }

    fn spelt_in_bytes(&self) -> bool {
        self.letters.is_some()
    }

    fn end(&self) -> Option<u32> {
        let usual = [END, "<|end_of_text|>", "</s>", "<eos>", "[SEP]"];
        usual.into_iter().find_map(|token| self.inner.token_to_id(token))
    }

    fn encode(&self, text: &[u8], what: &str) -> Result<Vec<u32>> {
        use rayon::prelude::*;
        let text = std::str::from_utf8(text).map_err(|e| {
            Error::new(format!(
                "{what}: not UTF-8 at byte {}; a tokenizer needs text, only bytes as tokens (no --tokenizer) take anything",
                e.valid_up_to()
            ))
        })?;
        // in pieces where the tokens do not depend on the cut: many at a time, and each a short text, of which it makes quick work
        let parts = if self.letters.is_some() { pieces(text, 1 << 16) } else { vec![text] };
        let ids: Vec<Vec<u32>> = parts
            .into_par_iter()
            .map(|part| {
                let quick = self.words.as_ref().map_or(Ok(None), |words| words.encode(&self.inner, part));
                let ids = quick.and_then(|ids| match ids {
                    Some(ids) => Ok(ids),
                    None => self.inner.encode_fast(part, false).map(|e| e.get_ids().to_vec()),
                });
                ids.map_err(|e| Error::new(format!("{what}: {e}")))
            })
            .collect::<Result<_>>()?;
        Ok(ids.concat())
    }

    fn decode(&self, ids: &[u32]) -> Vec<u8> {
        let Some(letters) = &self.letters else {
            return self.inner.decode(ids, true).unwrap_or_default().into_bytes();
        };
        let added = self.inner.get_added_tokens_decoder();
        let mut bytes = Vec::new();
        for &id in ids {
            match added.get(&id) {
                Some(token) if token.special => {}
                Some(token) => bytes.extend(token.content.bytes()), // spelt as it is
                None => {
                    let token = self.inner.id_to_token(id).unwrap_or_default();
                    bytes.extend(token.chars().filter_map(|c| letters.get(&c)));
                }
            }
        }
        bytes
    }
}

/// There is none in a program that was built without the feature.
#[cfg(not(feature = "tokenizers"))]
pub enum Json {}

#[cfg(not(feature = "tokenizers"))]
impl Json {
    fn parse(_: String, origin: &str) -> Result<Self> {
        Err(Error::new(format!(
            "tokenizer {origin}: this program was built without tokenizers; build it with `--features tokenizers`"
        )))
    }

    fn text(&self) -> &str {
        match *self {}
    }

    fn origin(&self) -> &str {
        match *self {}
    }

    fn vocab(&self) -> usize {
        match *self {}
    }

    fn spelt_in_bytes(&self) -> bool {
        match *self {}
    }

    fn end(&self) -> Option<u32> {
        match *self {}
    }

    fn encode(&self, _: &[u8], _: &str) -> Result<Vec<u32>> {
        match *self {}
    }

    fn decode(&self, _: &[u32]) -> Vec<u8> {
        match *self {}
    }
}

/// A digest in hexadecimal.
pub fn hex(digest: &[u8]) -> String {
    digest.iter().map(|b| format!("{b:02x}")).collect()
}

/// Pieces of at least `size` bytes but for the last, cut before a line break between a letter or digit and something that is no
/// white space. There, the patterns by which GPT-2's and later byte-level tokenizers divide a text into words always divide it, and
/// tokens do not reach over words.
#[cfg(any(feature = "tokenizers", test))]
fn pieces(text: &str, size: usize) -> Vec<&str> {
    let mut pieces = Vec::new();
    let mut start = 0;
    let bytes = text.as_bytes();
    let mut at = size;
    while at + 1 < bytes.len() {
        let fits =
            bytes[at] == b'\n' && bytes[at - 1].is_ascii_alphanumeric() && bytes[at + 1].is_ascii_graphic();
        if fits {
            pieces.push(&text[start..at]);
            start = at;
            at += size;
        } else {
            at += 1;
        }
    }
    pieces.push(&text[start..]);
    pieces
}

/// The letter that byte-level BPE writes for each byte (Radford et al. 2019, GPT-2): the byte's own where it can be seen, else
/// the next beyond 255.
pub fn byte_letters() -> impl Iterator<Item = char> {
    let mut next = 256..;
    (0..=255u8).map(move |byte| match byte {
        b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => char::from(byte),
        _ => next.next().and_then(char::from_u32).expect("letters up to 323"),
    })
}

/// Trains a byte-level BPE on text and writes its `tokenizer.json`.
///
/// # Errors
/// Data that cannot be read or is not UTF-8, a vocabulary too small for all bytes, a file that exists.
#[cfg(feature = "tokenizers")]
pub fn train(args: &TokenizerArgs) -> Result<()> {
    use crate::data::text_files;
    use crate::files::write_atomically;
    use tokenizers::models::bpe::{BPE, BpeTrainer};
    use tokenizers::pre_tokenizers::byte_level::ByteLevel;
    use tokenizers::{AddedToken, ModelWrapper};

    if args.vocab < 257 {
        return Err(Error::new(format!(
            "--vocab is {}: it must be at least 257, for each byte and {END}",
            args.vocab
        )));
    }
    if args.out.exists() {
        return Err(Error::new(format!("{} exists; choose another --out", args.out.display())));
    }
    let (files, _) = text_files(&args.data)?;
    let mut texts = Vec::new();
    for (file, text) in files {
        texts.push(String::from_utf8(text).map_err(|e| {
            Error::new(format!("{}: not UTF-8 at byte {}", file.display(), e.utf8_error().valid_up_to()))
        })?);
    }
    let bytes: usize = texts.iter().map(String::len).sum();
    let letters = ByteLevel::new(false, true, true); // no space before the first word; GPT-2's words
    let mut tokenizer = tokenizers::Tokenizer::new(ModelWrapper::BPE(BPE::default()));
    tokenizer.with_pre_tokenizer(Some(letters)).with_decoder(Some(letters));
    let mut trainer: tokenizers::models::TrainerWrapper = BpeTrainer::builder()
        .vocab_size(args.vocab)
        .min_frequency(2)
        .show_progress(false)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .special_tokens(vec![AddedToken::from(END, true)])
        .build()
        .into();
    let lines = texts.iter().flat_map(|text| pieces(text, 1 << 12));
    let failed = |e: tokenizers::Error| Error::new(format!("cannot train a tokenizer: {e}"));
    tokenizer.train(&mut trainer, lines).map_err(failed)?;
    let json = tokenizer.to_string(true).map_err(failed)?;
    let Tokenizer::Json(own) = Tokenizer::from_json(json.clone(), "of this training")? else {
        unreachable!()
    };
    if own.vocab < args.vocab {
        eprintln!("{bytes} bytes of text have pairs for no more than {} tokens", own.vocab);
    }
    let tokens: usize =
        texts.iter().map(|t| Ok(own.encode(t.as_bytes(), "the data")?.len())).sum::<Result<_>>()?;
    write_atomically(&args.out, json.as_bytes())?;
    crate::say!(
        "{}: {} tokens; {bytes} bytes of text are {tokens} of them, {:.2} bytes each",
        args.out.display(),
        own.vocab,
        bytes as f64 / tokens as f64
    );
    Ok(())
}

#[cfg(not(feature = "tokenizers"))]
pub fn train(_: &TokenizerArgs) -> Result<()> {
    Tokenizer::from_json(String::new(), "to be trained").map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Published in GPT-2's vocabulary: space is Ġ, newline Ċ, and the soft hyphen, the last without a letter of its own, Ń.
    #[test]
    fn bytes_have_gpt2s_letters() {
        let letters: Vec<char> = byte_letters().collect();
        assert_eq!((letters[0], letters[10], letters[32]), ('Ā', 'Ċ', 'Ġ'));
        assert_eq!((letters[b'A' as usize], letters[0xad], letters[0xff]), ('A', 'Ń', 'ÿ'));
        let distinct: std::collections::BTreeSet<char> = letters.iter().copied().collect();
        assert_eq!(distinct.len(), 256);
    }

    #[test]
    fn bytes_are_their_own_tokens() {
        let bytes: Vec<u8> = (0..=255).collect();
        let ids = Tokenizer::Bytes.encode(&bytes, "").unwrap();
        assert_eq!(ids, (0..256).collect::<Vec<u32>>());
        assert_eq!(Tokenizer::Bytes.decode(&ids), bytes);
        assert_eq!(Tokenizer::Bytes.decode(&[65, 256, 4000, 66]), b"AB");
    }

    #[test]
    fn cuts_are_before_single_line_breaks() {
        assert_eq!(
            pieces("one\ntwo\n\nthree.\nfour \nfive\n six\nse", 1),
            ["one", "\ntwo\n\nthree.\nfour \nfive\n six", "\nse"]
        );
        assert_eq!(pieces("ab", 5), ["ab"]);
        assert_eq!(pieces("", 5), [""]);
    }

    #[cfg(feature = "tokenizers")]
    mod json {
        use super::*;

        const TEXT: &str =
            "The quick brown fox\njumps over the lazy dog.\n\nIt's 1234 dogs,  über – 你好!\n\tEnd\nof it.\n";

        /// A tokenizer trained on repetitions of TEXT.
        fn trained(vocab: usize) -> (tempfile::TempDir, Tokenizer) {
            let dir = tempfile::tempdir().unwrap();
            let data = dir.path().join("data.txt");
            fs::write(&data, TEXT.repeat(20)).unwrap();
            let out = dir.path().join("tokenizer.json");
            train(&TokenizerArgs { data: vec![data], vocab, out: out.clone() }).unwrap();
            let tokenizer = Tokenizer::open(Some(&out)).unwrap();
            (dir, tokenizer)
        }

        #[test]
        fn a_trained_tokenizer_gives_every_text_back() {
            let (dir, tokenizer) = trained(300);
            assert_eq!(tokenizer.vocab(), 300);
            let ids = tokenizer.encode(TEXT.as_bytes(), "").unwrap();
            assert!(ids.len() < TEXT.len(), "{} tokens", ids.len());
            assert_eq!(tokenizer.decode(&ids), TEXT.as_bytes());
            // characters that it never saw, cut at every token
            let other = "αβγ 🦀\u{ad}\r\n\0";
            let ids = tokenizer.encode(other.as_bytes(), "").unwrap();
            let one_by_one: Vec<u8> = ids.iter().flat_map(|&id| tokenizer.decode(&[id])).collect();
            assert_eq!(one_by_one, other.as_bytes());
            assert_eq!(tokenizer.decode(&[tokenizer.end().unwrap(), 9999]), b"");
            let again = train(&TokenizerArgs {
                data: vec![dir.path().join("data.txt")],
                vocab: 300,
                out: dir.path().join("tokenizer.json"),
            });
            assert!(again.unwrap_err().to_string().contains("exists"));
        }

        /// The oracle is the text in one piece.
        #[test]
        fn pieces_do_not_change_the_tokens() {
            let (_dir, Tokenizer::Json(json)) = trained(400) else { panic!() };
            let text = TEXT.repeat(50);
            let whole = json.inner.encode_fast(text.as_str(), false).unwrap().get_ids().to_vec();
            for size in [1, 7, 100, 1000] {
                let parts = pieces(&text, size);
                assert!(parts.len() > 1 && parts.concat() == text);
                let ids: Vec<u32> = parts
                    .into_iter()
                    .flat_map(|part| json.inner.encode_fast(part, false).unwrap().get_ids().to_vec())
                    .collect();
                assert_eq!(ids, whole, "pieces of {size}");
            }
        }

        #[test]
        fn what_is_no_tokenizer_is_refused() {
            let error = |text: &str| Tokenizer::from_json(text.into(), "x.json").err().unwrap().to_string();
            assert!(error("{").starts_with("tokenizer x.json: not a tokenizer.json"), "{}", error("{"));
            assert!(error("{\"model\": 3}").starts_with("tokenizer x.json: not a tokenizer.json"));
            let (dir, tokenizer) = trained(260);
            let error = tokenizer.encode(b"good\xffbad", "the file").unwrap_err().to_string();
            assert!(error.starts_with("the file: not UTF-8 at byte 4"), "{error}");
            let args = |vocab| TokenizerArgs {
                data: vec![dir.path().join("data.txt")],
                vocab,
                out: dir.path().join("other.json"),
            };
            assert!(train(&args(256)).unwrap_err().to_string().contains("at least 257"));
            let missing = Tokenizer::open(Some(Path::new("/no/such"))).err().unwrap().to_string();
            assert!(missing.starts_with("cannot read the tokenizer /no/such: "), "{missing}");
        }
    }
}
