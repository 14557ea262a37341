//! Numbers from NumPy's files: `.npz` archives of arrays, and their conversion to what a graph input wants.
//!
//! Owns the format (NumPy's NEP 1, versions 1 to 3). Reads bool, integers and floating point of any width that ONNX has, little
//! endian, C or Fortran order; no objects, no strings.

use half::f16;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

/// No calibration is larger; a header that says otherwise is wrong.
const MAX_BYTES: u64 = 16 << 30;

/// Why a file of arrays could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ArrayError {
    #[error("cannot read {}", path.display())]
    Io {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("{} is not an archive of NumPy arrays ({what}); expected what numpy.savez writes", path.display())]
    NotNpz { path: PathBuf, what: String },
    #[error("the array `{name}` of {}: {what}", path.display())]
    Array {
        path: PathBuf,
        name: String,
        what: String,
    },
}

/// An array in C order.
#[derive(Clone, Debug, PartialEq)]
pub struct Array {
    pub dims: Vec<usize>,
    pub data: Data,
}

/// The numbers of an [`Array`], widened or narrowed to three kinds.
#[derive(Clone, Debug, PartialEq)]
pub enum Data {
    /// float16, float32 and float64, the last one rounded.
    Float(Vec<f32>),
    /// All integers.
    Int(Vec<i64>),
    Bool(Vec<bool>),
}

impl Data {
    pub fn len(&self) -> usize {
        match self {
            Data::Float(v) => v.len(),
            Data::Int(v) => v.len(),
            Data::Bool(v) => v.len(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Number `i` as a floating-point one.
    pub fn number(&self, i: usize) -> Option<f64> {
        match self {
            Data::Float(v) => v.get(i).map(|&x| f64::from(x)),
            Data::Int(v) => v.get(i).map(|&x| x as f64),
            Data::Bool(v) => v.get(i).map(|&x| f64::from(u8::from(x))),
        }
    }

    fn pick(&self, ranges: impl Iterator<Item = std::ops::Range<usize>>) -> Data {
        fn all<T: Copy>(v: &[T], ranges: impl Iterator<Item = std::ops::Range<usize>>) -> Vec<T> {
            ranges.flat_map(|r| v[r].iter().copied()).collect()
        }
        match self {
            Data::Float(v) => Data::Float(all(v, ranges)),
            Data::Int(v) => Data::Int(all(v, ranges)),
            Data::Bool(v) => Data::Bool(all(v, ranges)),
        }
    }
}

impl Array {
    pub fn floats(dims: Vec<usize>, values: Vec<f32>) -> Self {
        debug_assert_eq!(dims.iter().product::<usize>(), values.len());
        Self {
            dims,
            data: Data::Float(values),
        }
    }

    /// Elements of one row along axis 0.
    fn row_len(&self) -> usize {
        self.dims.iter().skip(1).product()
    }

    /// Rows along axis 0; none for a scalar.
    pub fn rows(&self) -> Option<usize> {
        self.dims.first().copied()
    }

    /// These rows along axis 0, in this order. The array has them.
    pub fn take_rows(&self, rows: &[usize]) -> Array {
        let len = self.row_len();
        let mut dims = self.dims.clone();
        dims[0] = rows.len();
        Array {
            dims,
            data: self.data.pick(rows.iter().map(|r| r * len..(r + 1) * len)),
        }
    }

    /// Entry `i` along axis 0, without that axis. The array has it.
    pub fn entry(&self, i: usize) -> Array {
        let mut entry = self.take_rows(&[i]);
        entry.dims.remove(0);
        entry
    }
}

/// Reads all arrays of an `.npz` file by name.
///
/// # Errors
/// See [`ArrayError`].
pub fn read_npz(path: &Path) -> Result<BTreeMap<String, Array>, ArrayError> {
    let not_npz = |what: String| ArrayError::NotNpz {
        path: path.into(),
        what,
    };
    let file = File::open(path).map_err(|source| ArrayError::Io {
        path: path.into(),
        source,
    })?;
    let mut archive = zip::ZipArchive::new(file).map_err(|e| not_npz(e.to_string()))?;
    let mut arrays = BTreeMap::new();
    for i in 0..archive.len() {
        let entry = archive.by_index(i).map_err(|e| not_npz(e.to_string()))?;
        let name = entry.name().trim_end_matches(".npy").to_owned();
        let wrong = |what: String| ArrayError::Array {
            path: path.into(),
            name: name.clone(),
            what,
        };
        let mut bytes = Vec::new();
        entry
            .take(MAX_BYTES)
            .read_to_end(&mut bytes)
            .map_err(|e| wrong(e.to_string()))?;
        let array = parse_npy(&bytes).map_err(wrong)?;
        arrays.insert(name, array);
    }
    Ok(arrays)
}

/// Reads one `.npy` file.
fn parse_npy(bytes: &[u8]) -> Result<Array, String> {
    let rest = bytes
        .strip_prefix(b"\x93NUMPY")
        .ok_or("it does not begin as a NumPy array does")?;
    let (&[major, _], rest) = rest.split_first_chunk::<2>().ok_or("it is cut short")?;
    let (header_len, rest) = if major == 1 {
        let (n, rest) = rest.split_first_chunk::<2>().ok_or("it is cut short")?;
        (usize::from(u16::from_le_bytes(*n)), rest)
    } else {
        let (n, rest) = rest.split_first_chunk::<4>().ok_or("it is cut short")?;
        (u32::from_le_bytes(*n) as usize, rest)
    };
    let (header, data) = rest
        .split_at_checked(header_len)
        .ok_or("its header is cut short")?;
    let header = std::str::from_utf8(header).map_err(|_| "its header is not text")?;
    let kind = between(header, "'descr':", ",")
        .map(|v| v.trim().trim_matches('\''))
        .ok_or("its header has no 'descr'")?;
    let fortran = between(header, "'fortran_order':", ",").is_some_and(|v| v.trim() == "True");
    let shape = between(header, "'shape':", ")").ok_or("its header has no 'shape'")?;
    let dims = shape
        .trim()
        .trim_start_matches('(')
        .split(',')
        .map(str::trim)
        .filter(|d| !d.is_empty())
        .map(|d| d.trim_end_matches('L').parse::<usize>())
        .collect::<Result<Vec<_>, _>>()
        .map_err(|_| format!("its shape is {shape}), expected whole numbers"))?;
    let len = dims
        .iter()
        .try_fold(1usize, |n, &d| n.checked_mul(d))
        .ok_or("its shape overflows")?;
    let data = numbers(kind, data, len)?;
    let array = Array { dims, data };
    Ok(if fortran { c_order(&array) } else { array })
}

fn between<'a>(text: &'a str, from: &str, to: &str) -> Option<&'a str> {
    let (_, rest) = text.split_once(from)?;
    rest.split_once(to).map(|(value, _)| value)
}

fn numbers(kind: &str, data: &[u8], len: usize) -> Result<Data, String> {
    fn each<const N: usize, T>(
        data: &[u8],
        len: usize,
        read: impl Fn([u8; N]) -> T,
    ) -> Result<Vec<T>, String> {
        let (chunks, rest) = data.as_chunks::<N>();
        if chunks.len() != len || !rest.is_empty() {
            return Err(format!(
                "it has {} bytes of data, expected {} for its shape",
                data.len(),
                len * N
            ));
        }
        Ok(chunks.iter().map(|c| read(*c)).collect())
    }
    Ok(match kind {
        "<f2" => Data::Float(each(data, len, |b| f16::from_le_bytes(b).to_f32())?),
        "<f4" => Data::Float(each(data, len, f32::from_le_bytes)?),
        "<f8" => Data::Float(each(data, len, |b| f64::from_le_bytes(b) as f32)?),
        "<i8" => Data::Int(each(data, len, i64::from_le_bytes)?),
        "<i4" => Data::Int(each(data, len, |b| i64::from(i32::from_le_bytes(b)))?),
        "<i2" => Data::Int(each(data, len, |b| i64::from(i16::from_le_bytes(b)))?),
        "|i1" => Data::Int(each(data, len, |b| i64::from(i8::from_le_bytes(b)))?),
        "<u4" => Data::Int(each(data, len, |b| i64::from(u32::from_le_bytes(b)))?),
        "<u2" => Data::Int(each(data, len, |b| i64::from(u16::from_le_bytes(b)))?),
        "|u1" => Data::Int(each(data, len, |b: [u8; 1]| i64::from(b[0]))?),
        "|b1" => Data::Bool(each(data, len, |b: [u8; 1]| b[0] != 0)?),
        other => {
            return Err(format!(
                "its type is {other}, expected float16, float32, float64, an integer of at most 64 bits or bool, little endian"
            ));
        }
    })
}

/// An array whose numbers are in Fortran order, in C order.
fn c_order(array: &Array) -> Array {
    let dims = &array.dims;
    let len = array.data.len();
    let order = (0..len).map(|mut at| {
        // `at` counts in C order: take its index apart from the last axis on.
        let mut index = vec![0; dims.len()];
        for (i, &d) in index.iter_mut().zip(dims).rev() {
            *i = at % d;
            at /= d;
        }
        let from = index.iter().zip(dims).rev().fold(0, |n, (i, d)| n * d + i);
        from..from + 1
    });
    Array {
        dims: dims.clone(),
        data: array.data.pick(order),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn npy(descr: &str, fortran: &str, shape: &str, data: &[u8]) -> Vec<u8> {
        let header =
            format!("{{'descr': '{descr}', 'fortran_order': {fortran}, 'shape': {shape}, }}\n");
        let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
        bytes.extend((header.len() as u16).to_le_bytes());
        bytes.extend(header.bytes());
        bytes.extend(data);
        bytes
    }

    #[test]
    fn types_and_shapes_are_read() {
        let data: Vec<u8> = [1f32, -2.5].iter().flat_map(|x| x.to_le_bytes()).collect();
        let array = parse_npy(&npy("<f4", "False", "(2, 1)", &data)).unwrap();
        assert_eq!(array, Array::floats(vec![2, 1], vec![1.0, -2.5]));
        let one = parse_npy(&npy("<i8", "False", "()", &7i64.to_le_bytes())).unwrap();
        assert_eq!((one.dims.len(), one.data), (0, Data::Int(vec![7])));
        let flags = parse_npy(&npy("|b1", "False", "(2,)", &[1, 0])).unwrap();
        assert_eq!(flags.data, Data::Bool(vec![true, false]));
        let half = parse_npy(&npy(
            "<f2",
            "False",
            "(1,)",
            &f16::from_f32(0.5).to_le_bytes(),
        ))
        .unwrap();
        assert_eq!(half.data, Data::Float(vec![0.5]));
    }

    #[test]
    fn fortran_order_becomes_c_order() {
        // [[0, 1, 2], [3, 4, 5]] by columns.
        let array = parse_npy(&npy("|u1", "True", "(2, 3)", &[0, 3, 1, 4, 2, 5])).unwrap();
        assert_eq!(array.data, Data::Int(vec![0, 1, 2, 3, 4, 5]));
    }

    #[test]
    fn what_cannot_be_read_is_said() {
        let error = parse_npy(&npy("<U3", "False", "(1,)", &[0; 12])).unwrap_err();
        assert!(
            error.contains("<U3") && error.contains("float16"),
            "{error}"
        );
        let error = parse_npy(&npy("<f4", "False", "(3,)", &[0; 8])).unwrap_err();
        assert!(error.contains("8 bytes") && error.contains("12"), "{error}");
        for end in 0..60 {
            let _ = parse_npy(&npy("<f4", "False", "(1,)", &[0; 4])[..end]);
        }
    }

    #[test]
    fn rows_and_entries_are_picked() {
        let array = Array::floats(vec![3, 2], vec![0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
        assert_eq!(
            array.take_rows(&[2, 0]),
            Array::floats(vec![2, 2], vec![4.0, 5.0, 0.0, 1.0])
        );
        assert_eq!(array.entry(1), Array::floats(vec![2], vec![2.0, 3.0]));
    }
}
