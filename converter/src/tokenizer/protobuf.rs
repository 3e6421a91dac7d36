//! SentencePiece's `tokenizer.model`: the protocol-buffer message `ModelProto` of `sentencepiece_model.proto`.
//!
//! Only the fields that encoding depends on are read. Wire format: a varint key (field number times 8 plus wire type)
//! and a value whose length the wire type tells.

use super::json::TokenKind;
use super::sentencepiece::{Algorithm, Piece, SentencePiece};

/// A field's value; groups, which nobody writes any more, are not read.
enum Field<'a> {
    Varint(u64),
    Fixed64,
    Bytes(&'a [u8]),
    Fixed32([u8; 4]),
}

impl<'a> Field<'a> {
    fn bytes(self, what: &str) -> Result<&'a [u8], String> {
        if let Field::Bytes(bytes) = self { Ok(bytes) } else { Err(wrong_type(what)) }
    }

    fn varint(self, what: &str) -> Result<u64, String> {
        if let Field::Varint(value) = self { Ok(value) } else { Err(wrong_type(what)) }
    }
}

fn refuse_if(condition: bool, what: &str) -> Result<(), String> {
    if condition { Err(format!("{what}, which is not supported")) } else { Ok(()) }
}

fn wrong_type(what: &str) -> String {
    format!("not a SentencePiece model: {what} has the wrong wire type")
}

/// The fields of a message in order.
struct Message<'a> {
    rest: &'a [u8],
}

impl<'a> Message<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8], String> {
        let (taken, rest) = self.rest.split_at_checked(len).ok_or_else(|| {
            format!("not a SentencePiece model, or truncated: {len} bytes are needed, {} are left", self.rest.len())
        })?;
        self.rest = rest;
        Ok(taken)
    }

    fn varint(&mut self) -> Result<u64, String> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.take(1)?[0];
            value |= u64::from(byte & 127) << shift;
            if byte < 128 {
                return Ok(value);
            }
        }
        Err("not a SentencePiece model: a number has more than 64 bits".to_owned())
    }

    fn field(&mut self) -> Result<(u64, Field<'a>), String> {
        let key = self.varint()?;
        let value = match key & 7 {
            0 => Field::Varint(self.varint()?),
            1 => self.take(8).map(|_| Field::Fixed64)?,
            2 => {
                let len = self.varint()?;
                Field::Bytes(self.take(usize::try_from(len).unwrap_or(usize::MAX))?)
            }
            5 => {
                let bytes = self.take(4)?;
                Field::Fixed32([bytes[0], bytes[1], bytes[2], bytes[3]])
            }
            other => return Err(format!("not a SentencePiece model: a field has the wire type {other}")),
        };
        Ok((key >> 3, value))
    }
}

impl<'a> Iterator for Message<'a> {
    type Item = Result<(u64, Field<'a>), String>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() { None } else { Some(self.field()) }
    }
}

/// Reads a whole model, or says why it cannot.
pub(super) fn parse_model(bytes: &[u8]) -> Result<SentencePiece, String> {
    // The defaults are those of the schema.
    let mut model = SentencePiece {
        pieces: Vec::new(),
        algorithm: Algorithm::Unigram,
        unk_id: 0,
        bos_id: Some(1),
        eos_id: Some(2),
        add_bos: true,
        add_eos: false,
        byte_fallback: false,
        add_dummy_prefix: true,
        remove_extra_whitespaces: true,
        charsmap: Vec::new(),
        legacy: true,
    };
    for field in (Message { rest: bytes }) {
        match field? {
            (1, piece) => {
                let id = model.pieces.len();
                model.pieces.push(parse_piece(piece.bytes("pieces")?, id)?);
            }
            (2, trainer) => parse_trainer(trainer.bytes("trainer_spec")?, &mut model)?,
            (3, normalizer) => parse_normalizer(normalizer.bytes("normalizer_spec")?, &mut model)?,
            _ => {}
        }
    }
    if model.pieces.is_empty() {
        return Err("not a SentencePiece model: it has no pieces".to_owned());
    }
    Ok(model)
}

fn parse_piece(bytes: &[u8], id: usize) -> Result<Piece, String> {
    let mut piece = Piece { text: String::new(), score: 0.0, kind: TokenKind::Normal };
    for field in (Message { rest: bytes }) {
        match field? {
            (1, text) => {
                let text = std::str::from_utf8(text.bytes("piece")?);
                piece.text = text.map_err(|error| format!("piece {id} is not UTF-8: {error}"))?.to_owned();
            }
            (2, Field::Fixed32(score)) => piece.score = f32::from_le_bytes(score),
            (2, _) => return Err(wrong_type("score")),
            (3, kind) => {
                let code = kind.varint("type")?;
                piece.kind =
                    TokenKind::from_code(code).ok_or_else(|| format!("piece {id} has the unknown type {code}"))?;
            }
            _ => {}
        }
    }
    if piece.text.is_empty() {
        return Err(format!("piece {id} is empty"));
    }
    Ok(piece)
}

fn parse_trainer(bytes: &[u8], model: &mut SentencePiece) -> Result<(), String> {
    // A negative id, which the wire carries as a huge number, means that the model has no such token.
    let optional_id = |field: Field, what: &str| field.varint(what).map(|id| u32::try_from(id).ok());
    for field in (Message { rest: bytes }) {
        match field? {
            (3, algorithm) => {
                model.algorithm = match algorithm.varint("model_type")? {
                    1 => Algorithm::Unigram,
                    2 => Algorithm::Bpe,
                    other => {
                        let name = match other {
                            3 => "word",
                            4 => "character",
                            _ => "unknown",
                        };
                        return Err(format!("its model type is {other} ({name}); unigram and BPE are supported"));
                    }
                };
            }
            (24, suffix) => {
                let suffix = suffix.varint("treat_whitespace_as_suffix")? != 0;
                refuse_if(suffix, "it treats white space as a suffix")?;
            }
            (35, fallback) => model.byte_fallback = fallback.varint("byte_fallback")? != 0,
            (40, id) => {
                model.unk_id = optional_id(id, "unk_id")?.ok_or("it has no unknown token, which is required")?
            }
            (41, id) => model.bos_id = optional_id(id, "bos_id")?,
            (42, id) => model.eos_id = optional_id(id, "eos_id")?,
            _ => {}
        }
    }
    Ok(())
}

fn parse_normalizer(bytes: &[u8], model: &mut SentencePiece) -> Result<(), String> {
    for field in (Message { rest: bytes }) {
        match field? {
            (2, charsmap) => model.charsmap = charsmap.bytes("precompiled_charsmap")?.to_owned(),
            (3, prefix) => model.add_dummy_prefix = prefix.varint("add_dummy_prefix")? != 0,
            (4, remove) => model.remove_extra_whitespaces = remove.varint("remove_extra_whitespaces")? != 0,
            (5, escape) => {
                let raw = escape.varint("escape_whitespaces")? == 0;
                refuse_if(raw, "it keeps spaces as they are (escape_whitespaces is false)")?;
            }
            _ => {}
        }
    }
    Ok(())
}
