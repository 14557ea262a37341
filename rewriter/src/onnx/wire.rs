//! Protobuf wire format: a message as the list of its fields, each with its exact bytes.
//!
//! A message that is split here and joined again is byte-identical, whatever fields it has. Does not know any
//! message's schema.

use bytes::{Buf, Bytes};
use prost::encoding::{WireType, decode_key, decode_varint, encode_key, encode_varint};

/// One field of a message: its number, its exact bytes (key included) and, where it is length-delimited, its payload.
#[derive(Clone, Debug)]
pub struct Field {
    pub number: u32,
    pub raw: Bytes,
    /// `Some` for strings, bytes and sub-messages.
    pub payload: Option<Bytes>,
    /// `Some` for varints.
    pub varint: Option<u64>,
}

impl Field {
    /// Its payload, if it is the sub-message `number`. With another wire type a field of that number is one that protobuf does
    /// not know, and is kept like any other.
    pub fn message(&self, number: u32) -> Option<&Bytes> {
        self.payload.as_ref().filter(|_| self.number == number)
    }

    /// Its key and length, as they are before a payload.
    pub fn header(&self) -> Bytes {
        let payload = self.payload.as_ref().map_or(0, Bytes::len);
        self.raw.slice(..self.raw.len() - payload)
    }
}

/// The bytes do not form a protobuf message; `offset` is where in the message reading stopped.
#[derive(Debug, thiserror::Error)]
#[error("not a protobuf message: {what} at byte {offset}")]
pub struct WireError {
    pub what: String,
    pub offset: usize,
}

/// A description of a field takes fifty times the two bytes that a field may have. No exporter writes a message of so many.
const MAX_FIELDS: usize = 1 << 18;

/// Splits `message` into its fields without copying.
///
/// # Errors
/// Messages of more than 2¹⁸ fields, truncated fields, invalid keys and groups (which ONNX never uses) are refused.
pub fn split(message: &Bytes) -> Result<Vec<Field>, WireError> {
    let total = message.len();
    let mut rest = message.clone();
    let mut fields = Vec::new();
    while rest.has_remaining() {
        let start = total - rest.remaining();
        let fail = |what: String| WireError {
            what,
            offset: start,
        };
        if fields.len() == MAX_FIELDS {
            return Err(fail(format!("a message of more than {MAX_FIELDS} fields")));
        }
        let (number, kind) = decode_key(&mut rest).map_err(|e| fail(e.to_string()))?;
        let mut payload = None;
        let mut varint = None;
        match kind {
            WireType::Varint => {
                varint = Some(decode_varint(&mut rest).map_err(|e| fail(e.to_string()))?)
            }
            WireType::ThirtyTwoBit | WireType::SixtyFourBit => {
                let size = if kind == WireType::ThirtyTwoBit { 4 } else { 8 };
                if rest.remaining() < size {
                    return Err(fail("a truncated fixed-width field".into()));
                }
                rest.advance(size);
            }
            WireType::LengthDelimited => {
                let length = decode_varint(&mut rest).map_err(|e| fail(e.to_string()))?;
                let length = usize::try_from(length)
                    .ok()
                    .filter(|&l| l <= rest.remaining());
                let Some(length) = length else {
                    return Err(fail(format!(
                        "field {number} is longer than the message that holds it"
                    )));
                };
                payload = Some(rest.split_to(length));
            }
            WireType::StartGroup | WireType::EndGroup => {
                return Err(fail(format!(
                    "field {number} is a group, which ONNX does not use"
                )));
            }
        }
        let end = total - rest.remaining();
        fields.push(Field {
            number,
            raw: message.slice(start..end),
            payload,
            varint,
        });
    }
    Ok(fields)
}

/// The bytes of a length-delimited field's key and length, to be followed by `length` bytes of payload.
pub fn header(number: u32, length: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(12);
    encode_key(number, WireType::LengthDelimited, &mut out);
    encode_varint(length as u64, &mut out);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn fields_keep_their_exact_bytes() {
        // A varint written in a non-canonical, longer form must survive as it is.
        let message = Bytes::from_static(&[0x08, 0x81, 0x00, 0x12, 0x02, b'h', b'i']);
        let fields = split(&message).unwrap();
        assert_eq!(fields.len(), 2);
        assert_eq!(&fields[0].raw[..], &[0x08, 0x81, 0x00]);
        assert_eq!(fields[1].payload.as_deref(), Some(&b"hi"[..]));
    }

    #[test]
    fn a_sub_message_has_its_number_and_wire_type() {
        // A sub-message 2 whose length of 1 takes two bytes, and a number 2.
        let fields = split(&Bytes::from_static(&[0x12, 0x81, 0x00, b'x', 0x10, 0x05])).unwrap();
        assert_eq!(fields[0].message(2).map(|m| &m[..]), Some(&b"x"[..]));
        assert_eq!(&fields[0].header()[..], &[0x12, 0x81, 0x00]);
        assert_eq!(fields[0].message(3), None);
        assert_eq!(fields[1].message(2), None);
    }

    #[test]
    fn a_length_beyond_the_message_is_refused() {
        let error = split(&Bytes::from_static(&[0x12, 0x7f, 1])).unwrap_err();
        assert!(
            error.to_string().contains("longer than the message"),
            "{error}"
        );
    }

    proptest! {
        #[test]
        fn any_bytes_split_into_themselves_or_are_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let message = Bytes::from(bytes);
            if let Ok(fields) = split(&message) {
                let joined: Vec<u8> = fields.iter().flat_map(|f| f.raw.to_vec()).collect();
                prop_assert_eq!(&joined[..], &message[..]);
            }
        }
    }
}
