//! The words of GPT-2's byte-level tokenizers, found by hand, and each tokenized once: many times as fast as asking the crate
//! `tokenizers` for a whole text, which matches a regular expression at every word.
//!
//! The pattern is 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+ (Radford et al. 2019, encoder.py), and tokens
//! do not reach over words, so a text's tokens are those of its words one after the other. Only for tokenizers that do just that:
//! [`Words::of`] says which. Tokens of a word come from the crate's own model.

use std::collections::HashMap;
use std::sync::Mutex;

use regex_syntax::hir::{Class, ClassUnicode, HirKind};
use tokenizers::{Model, ModelWrapper, PreTokenizerWrapper, Tokenizer};

use crate::tokens::byte_letters;

/// Words that a cache holds; beyond that, new ones are not kept.
const WORDS: usize = 1 << 17;

/// The tokens of the words seen.
type Cache = HashMap<Box<str>, Box<[u32]>>;

/// What a character is to the pattern.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Letter,
    Number,
    Space,
    Other,
}

/// A tokenizer's way through a text, word by word.
pub struct Words {
    letters: ClassUnicode,
    numbers: ClassUnicode,
    ascii: [Kind; 128],
    /// How the model spells each byte.
    spelling: Vec<char>,
    /// Texts that stand for one token wherever they are, and that no word may cut.
    added: Vec<String>,
    /// As many as texts were encoded at once.
    caches: Mutex<Vec<Cache>>,
}

impl Words {
    /// For a tokenizer that divides by the pattern and by nothing else, changes no text before, and merges without chance.
    pub fn of(tokenizer: &Tokenizer) -> Option<Self> {
        let divides = matches!(tokenizer.get_pre_tokenizer(),
            Some(PreTokenizerWrapper::ByteLevel(level)) if level.use_regex && !level.add_prefix_space);
        let merges = matches!(tokenizer.get_model(), ModelWrapper::BPE(bpe)
            if bpe.dropout.is_none() && bpe.continuing_subword_prefix.is_none() && bpe.end_of_word_suffix.is_none());
        let whole = tokenizer.get_truncation().is_none() && tokenizer.get_padding().is_none();
        let added: Vec<String> =
            tokenizer.get_added_tokens_decoder().into_values().map(|token| token.content).collect();
        // the pattern's own words, where a token is one character, cannot be told from text
        let told = added.iter().all(|token| token.len() > 1);
        if !(divides && merges && whole && told && tokenizer.get_normalizer().is_none()) {
            return None;
        }
        let class = |pattern| match regex_syntax::parse(pattern).expect("a class").into_kind() {
            HirKind::Class(Class::Unicode(class)) => class,
            other => unreachable!("{pattern} is a class of characters, not {other:?}"),
        };
        let (letters, numbers) = (class(r"\p{L}"), class(r"\p{N}"));
        let ascii = std::array::from_fn(|i| kind(&letters, &numbers, char::from(i as u8)));
        let spelling = byte_letters().collect();
        Some(Words { letters, numbers, ascii, spelling, added, caches: Mutex::default() })
    }

    /// The tokens of a text; None where one of the tokens that no word may cut stands in it.
    ///
    /// # Errors
    /// A word that the model has no tokens for.
    pub fn encode(&self, tokenizer: &Tokenizer, text: &str) -> tokenizers::Result<Option<Vec<u32>>> {
        if self.added.iter().any(|token| text.contains(&**token)) {
            return Ok(None);
        }
        let mut cache = self.caches.lock().expect("no panic in between").pop().unwrap_or_default();
        let mut ids = Vec::with_capacity(text.len() / 3);
        let mut rest = text;
        while !rest.is_empty() {
            let (word, after) = rest.split_at(self.word(rest));
            rest = after;
            if let Some(known) = cache.get(word) {
                ids.extend_from_slice(known);
                continue;
            }
            let spelt: String = word.bytes().map(|b| self.spelling[b as usize]).collect();
            let tokens = tokenizer.get_model().tokenize(&spelt)?;
            let new: Box<[u32]> = tokens.into_iter().map(|token| token.id).collect();
            ids.extend_from_slice(&new);
            if cache.len() < WORDS {
                cache.insert(word.into(), new);
            }
        }
        self.caches.lock().expect("no panic in between").push(cache);
        Ok(Some(ids))
    }

    /// Bytes of the first word of a text that is not empty.
    fn word(&self, text: &str) -> usize {
        const ENDINGS: [&str; 7] = ["'s", "'t", "'re", "'ve", "'m", "'ll", "'d"];
        if let Some(ending) = ENDINGS.iter().find(|ending| text.starts_with(**ending)) {
            return ending.len();
        }
        let spaced = usize::from(text.starts_with(' '));
        match text[spaced..].chars().next().map(|c| self.kind(c)) {
            Some(kind) if kind != Kind::Space => return spaced + self.run(&text[spaced..], kind),
            _ => {}
        }
        // white space: all of it at the end of the text, else all but the last, if that leaves any
        let run = self.run(text, Kind::Space);
        let last = text[..run].chars().next_back().map_or(0, char::len_utf8);
        if run == text.len() || run == last { run } else { run - last }
    }

    /// Bytes at the beginning of a text that are of one kind.
    fn run(&self, text: &str, kind: Kind) -> usize {
        text.char_indices().find(|&(_, c)| self.kind(c) != kind).map_or(text.len(), |(at, _)| at)
    }

    fn kind(&self, c: char) -> Kind {
        match self.ascii.get(c as usize) {
            Some(&kind) => kind,
            None => kind(&self.letters, &self.numbers, c),
        }
    }
}

/// By the tables that the crate's regular expressions use.
fn kind(letters: &ClassUnicode, numbers: &ClassUnicode, c: char) -> Kind {
    let within = |class: &ClassUnicode| {
        let ranges = class.ranges();
        let next = ranges.partition_point(|range| range.end() < c);
        ranges.get(next).is_some_and(|range| range.start() <= c)
    };
    match c {
        _ if c.is_whitespace() => Kind::Space,
        _ if within(letters) => Kind::Letter,
        _ if within(numbers) => Kind::Number,
        _ => Kind::Other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand_chacha::ChaCha8Rng;
    use rand_chacha::rand_core::{Rng, SeedableRng};
    use tokenizers::AddedToken;
    use tokenizers::models::bpe::{BPE, BpeTrainer};
    use tokenizers::pre_tokenizers::byte_level::ByteLevel;

    const TEXT: &str = "It's  we've they'll\n\n\tthe 1234 dogs' tails, über – 你好! don't 'quote' ½ ²\u{a0}\u{3000}x\r\ny  \n z";

    fn trained(level: ByteLevel) -> Tokenizer {
        let mut tokenizer = Tokenizer::new(ModelWrapper::BPE(BPE::default()));
        tokenizer.with_pre_tokenizer(Some(PreTokenizerWrapper::ByteLevel(level)));
        let alphabet = ByteLevel::alphabet().into_iter().collect();
        let mut trainer =
            BpeTrainer::builder().vocab_size(320).show_progress(false).initial_alphabet(alphabet).build();
        let texts = [TEXT, "the the then dogs", "they've we've don't", "   \n\n  "];
        let mut wrapped = tokenizers::models::TrainerWrapper::BpeTrainer(std::mem::take(&mut trainer));
        tokenizer.train(&mut wrapped, texts.iter().map(|t| t.to_string())).unwrap();
        tokenizer.add_special_tokens(&[AddedToken::from("<|endoftext|>", true)]);
        tokenizer
    }

    /// The oracle is the crate's own way: on random texts of characters that the pattern tells apart, or might be thought to.
    #[test]
    fn words_have_the_tokens_of_the_whole_text() {
        let tokenizer = trained(ByteLevel::default().add_prefix_space(false));
        let words = Words::of(&tokenizer).unwrap();
        let alphabet: Vec<char> = "''' sstrevmlldDS  \n\n\t\r\u{b}\u{85}\u{a0}\u{3000}\u{200b}ab12½²Ⅷ٣,.!-é–你\u{301}ªー🦀\u{1F1E9}\0"
            .chars()
            .collect();
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        for case in 0..5000 {
            let length = rng.next_u32() % 24;
            let text: String =
                (0..length).map(|_| alphabet[rng.next_u32() as usize % alphabet.len()]).collect();
            let text = if case == 0 { TEXT.to_owned() } else { text };
            let whole = tokenizer.encode_fast(text.as_str(), false).unwrap().get_ids().to_vec();
            assert_eq!(words.encode(&tokenizer, &text).unwrap(), Some(whole), "{text:?}");
        }
        assert_eq!(words.encode(&tokenizer, "a <|endoftext|> b").unwrap(), None);
    }

    /// Every character of the planes that have letters, by itself and between others.
    #[test]
    fn every_character_is_of_the_kind_that_the_crate_takes_it_for() {
        let tokenizer = trained(ByteLevel::default().add_prefix_space(false));
        let words = Words::of(&tokenizer).unwrap();
        let all: Vec<char> = ('\0'..'\u{34000}').collect();
        for chunk in all.chunks(4096) {
            let text: String = chunk.iter().flat_map(|&c| ['a', c, '1', c, ' ', c, '.']).collect();
            let whole = tokenizer.encode_fast(text.as_str(), false).unwrap().get_ids().to_vec();
            assert!(words.encode(&tokenizer, &text).unwrap() == Some(whole), "from {:?} on", chunk[0]);
        }
    }

    #[test]
    fn other_tokenizers_are_left_to_the_crate() {
        assert!(Words::of(&trained(ByteLevel::default().add_prefix_space(true))).is_none());
        assert!(Words::of(&trained(ByteLevel::default().add_prefix_space(false).use_regex(false))).is_none());
        let mut lower = trained(ByteLevel::default().add_prefix_space(false));
        lower.with_normalizer(Some(tokenizers::normalizers::Lowercase));
        assert!(Words::of(&lower).is_none());
    }
}
