//! Damage to a protobuf message that leaves most of it a message, so that what reads it gets deep before it notices.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use std::ops::Range;

/// A source of damage; the same seed does the same.
pub struct Damage(ChaCha8Rng);

/// A field of a message: all of it, and what it holds if it is length-delimited.
struct Field {
    whole: Range<usize>,
    payload: Option<Range<usize>>,
}

const EXTREMES: [i64; 9] = [
    0,
    1,
    2,
    -1,
    i64::MAX,
    i64::MIN,
    1 << 31,
    (1 << 31) - 1,
    1 << 62,
];

impl Damage {
    pub fn new(seed: u64) -> Self {
        Self(ChaCha8Rng::seed_from_u64(seed))
    }

    /// A number below `n`, or 0.
    pub fn below(&mut self, n: usize) -> usize {
        (self.0.next_u64() % n.max(1) as u64) as usize
    }

    /// Does one thing to `message`.
    pub fn strike(&mut self, message: &mut Vec<u8>) {
        if self.below(2) == 0 {
            let depth = self.below(7);
            *message = self.restructured(message, depth);
        } else {
            self.overwrite(message);
        }
    }

    /// `message` with a field removed, repeated, moved, replaced by a neighbour or set to an extreme number, up to `depth` messages
    /// inside; the lengths around it are corrected.
    fn restructured(&mut self, message: &[u8], depth: usize) -> Vec<u8> {
        let found = fields(message);
        if found.is_empty() {
            return message.to_vec();
        }
        let mut parts: Vec<Vec<u8>> = found
            .iter()
            .map(|f| message[f.whole.clone()].to_vec())
            .collect();
        // What no field was read from stays at the end.
        let rest = found.last().map_or(0, |f| f.whole.end);
        let (at, other) = (self.below(parts.len()), self.below(parts.len()));
        let field = &found[at];
        let inner = field.payload.clone().map(|p| &message[p]);
        match inner {
            Some(inner) if depth > 0 && !fields(inner).is_empty() => {
                let inner = self.restructured(inner, depth - 1);
                let mut key = field.whole.start;
                varint(message, &mut key);
                let mut part = message[field.whole.start..key].to_vec();
                put_varint(inner.len() as u64, &mut part);
                part.extend(inner);
                parts[at] = part;
            }
            _ => match self.below(5) {
                0 => parts[at].clear(),
                1 => parts.insert(other, parts[at].clone()),
                2 => parts.swap(at, other),
                3 => parts[at] = parts[other].clone(),
                _ if message[field.whole.start] & 7 == 0 => {
                    let mut key = field.whole.start;
                    varint(message, &mut key);
                    parts[at].truncate(key - field.whole.start);
                    put_varint(EXTREMES[self.below(EXTREMES.len())] as u64, &mut parts[at]);
                }
                _ => {
                    let part = parts.remove(at);
                    parts.push(part);
                }
            },
        }
        let mut whole = parts.concat();
        whole.extend(&message[rest..]);
        whole
    }

    /// What a length-delimited field anywhere in the message holds. Follows lengths downwards.
    fn payload(&mut self, message: &[u8]) -> Option<Range<usize>> {
        let mut at = 0..message.len();
        for _ in 0..1 + self.below(7) {
            let inner: Vec<Range<usize>> = fields(&message[at.clone()])
                .into_iter()
                .filter_map(|f| f.payload)
                .collect();
            if inner.is_empty() {
                break;
            }
            let inner = &inner[self.below(inner.len())];
            at = at.start + inner.start..at.start + inner.end;
        }
        (!at.is_empty()).then_some(at)
    }

    /// Overwrites bytes of a field and changes no length, but for cutting the message off.
    fn overwrite(&mut self, message: &mut Vec<u8>) {
        let Some(field) = self.payload(message) else {
            return;
        };
        let at = field.start + self.below(field.len());
        match self.below(7) {
            0 => message[at] ^= 1 << self.below(8),
            1 => message[at] = [0, 1, 2, 0x7f, 0x80, 0xff][self.below(6)],
            2 => message[field].fill([0, 0xff, 0x7f, b'x'][self.below(4)]),
            3 => message[field].reverse(),
            4 => {
                if let Some(from) = self.payload(message) {
                    let n = field.len().min(from.len());
                    message.copy_within(from.start..from.start + n, field.start);
                }
            }
            5 => {
                // Little-endian, as in raw data.
                let value = EXTREMES[self.below(EXTREMES.len())];
                for (to, from) in message[at..field.end].iter_mut().zip(value.to_le_bytes()) {
                    *to = from;
                }
            }
            _ => message.truncate(at),
        }
    }
}

fn varint(message: &[u8], at: &mut usize) -> Option<u64> {
    let mut value = 0u64;
    for shift in (0..64).step_by(7) {
        let byte = *message.get(*at)?;
        *at += 1;
        value |= u64::from(byte & 127) << shift;
        if byte < 128 {
            return Some(value);
        }
    }
    None
}

fn put_varint(mut value: u64, out: &mut Vec<u8>) {
    while value > 127 {
        out.push(value as u8 | 128);
        value >>= 7;
    }
    out.push(value as u8);
}

/// The fields of `message`, as far as it is one.
fn fields(message: &[u8]) -> Vec<Field> {
    let mut found = Vec::new();
    let mut at = 0;
    while at < message.len() {
        let start = at;
        let mut payload = None;
        let Some(key) = varint(message, &mut at) else {
            break;
        };
        let length = match key & 7 {
            0 => varint(message, &mut at).map(|_| 0),
            1 => Some(8),
            2 => varint(message, &mut at),
            5 => Some(4),
            _ => None,
        };
        let Some(length) = length else { break };
        let end = at.saturating_add(usize::try_from(length).unwrap_or(usize::MAX));
        if end > message.len() {
            break;
        }
        if key & 7 == 2 {
            payload = Some(at..end);
        }
        at = end;
        found.push(Field {
            whole: start..end,
            payload,
        });
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Field 1 is 5, field 2 holds a message whose field 3 is "abc".
    const NESTED: [u8; 9] = [0x08, 5, 0x12, 5, 0x1a, 3, b'a', b'b', b'c'];

    #[test]
    fn fields_are_found_with_their_payloads() {
        let found = fields(&NESTED);
        let places: Vec<_> = found.into_iter().map(|f| (f.whole, f.payload)).collect();
        assert_eq!(places, [(0..2, None), (2..9, Some(4..9))]);
        assert!(fields(&[0x12, 9, 0]).is_empty());
    }

    #[test]
    fn a_restructured_message_is_one() {
        let mut changed = 0;
        for seed in 0..200 {
            let after = Damage::new(seed).restructured(&NESTED, 1);
            let read = fields(&after).last().map_or(0, |f| f.whole.end);
            assert_eq!(read, after.len(), "seed {seed}: {after:?}");
            changed += usize::from(after != NESTED);
        }
        assert!(changed > 100, "{changed}");
    }

    #[test]
    fn the_same_seed_does_the_same() {
        let damaged = |seed| {
            let mut message = NESTED.to_vec();
            let mut damage = Damage::new(seed);
            (0..3).for_each(|_| damage.strike(&mut message));
            message
        };
        assert_eq!(damaged(7), damaged(7));
        assert!((0..20).any(|seed| damaged(seed) != damaged(7)));
    }
}
