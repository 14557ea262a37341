//! Tensors of ONNX Runtime as Rust slices: shape, element type, bytes.
//!
//! Owns the decision which Rust types may look at which tensors. It copies nothing.

use half::{bf16, f16};
use ort_sys::{ONNXTensorElementDataType, OrtTensorTypeAndShapeInfo, OrtValue};

use super::error::Error;
use super::host::{Host, UNWRITTEN, function, no_reply_error, require_reply};

/// Element type of a tensor. `Other` keeps the number of a type that we cannot read (strings, 4-bit, complex, …).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ElementType {
    F32,
    F64,
    F16,
    BF16,
    I8,
    I16,
    I32,
    I64,
    U8,
    U16,
    U32,
    U64,
    Bool,
    Other(i32),
}

impl ElementType {
    fn from_raw(raw: i32) -> Self {
        use ONNXTensorElementDataType as D;
        const KNOWN: [(ONNXTensorElementDataType, ElementType); 13] = [
            (D::ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, ElementType::F32),
            (D::ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE, ElementType::F64),
            (D::ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, ElementType::F16),
            (D::ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16, ElementType::BF16),
            (D::ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8, ElementType::I8),
            (D::ONNX_TENSOR_ELEMENT_DATA_TYPE_INT16, ElementType::I16),
            (D::ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32, ElementType::I32),
            (D::ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, ElementType::I64),
            (D::ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8, ElementType::U8),
            (D::ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT16, ElementType::U16),
            (D::ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT32, ElementType::U32),
            (D::ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT64, ElementType::U64),
            (D::ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL, ElementType::Bool),
        ];
        KNOWN
            .iter()
            .find(|(known, _)| *known as i32 == raw)
            .map_or(ElementType::Other(raw), |(_, ours)| *ours)
    }

    /// Bytes of one element; `None` for types that we cannot read.
    pub fn size(self) -> Option<usize> {
        Some(match self {
            ElementType::F64 | ElementType::I64 | ElementType::U64 => 8,
            ElementType::F32 | ElementType::I32 | ElementType::U32 => 4,
            ElementType::F16 | ElementType::BF16 | ElementType::I16 | ElementType::U16 => 2,
            ElementType::I8 | ElementType::U8 | ElementType::Bool => 1,
            ElementType::Other(_) => return None,
        })
    }
}

impl std::fmt::Display for ElementType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            ElementType::F32 => "float",
            ElementType::F64 => "double",
            ElementType::F16 => "float16",
            ElementType::BF16 => "bfloat16",
            ElementType::I8 => "int8",
            ElementType::I16 => "int16",
            ElementType::I32 => "int32",
            ElementType::I64 => "int64",
            ElementType::U8 => "uint8",
            ElementType::U16 => "uint16",
            ElementType::U32 => "uint32",
            ElementType::U64 => "uint64",
            ElementType::Bool => "bool",
            ElementType::Other(raw) => return write!(f, "type {raw}"),
        })
    }
}

/// A Rust type that can stand for a tensor's elements: every bit pattern is a value of it. Sealed.
pub trait Scalar: sealed::Sealed + Copy + Send + Sync + 'static {
    const ELEMENT: ElementType;
}

mod sealed {
    pub trait Sealed {}
}

macro_rules! scalars {
    ($($rust:ty => $element:ident),*) => { $(
        impl sealed::Sealed for $rust {}
        impl Scalar for $rust { const ELEMENT: ElementType = ElementType::$element; }
    )* };
}
scalars!(f32 => F32, f64 => F64, f16 => F16, bf16 => BF16, i32 => I32, i64 => I64);

/// A tensor that is read.
#[derive(Clone, Debug)]
pub struct Tensor<'a> {
    dims: Vec<usize>,
    element: ElementType,
    bytes: Option<&'a [u8]>,
}

impl<'a> Tensor<'a> {
    /// # Safety
    /// `value` is a live tensor of `host`, in memory that the CPU can read and that nobody writes during `'a`.
    pub(crate) unsafe fn new(host: &Host, value: *const OrtValue) -> Result<Self, Error> {
        // SAFETY: the caller's promise.
        let described = unsafe { describe(host, value)? };
        let bytes = described.len.map(|len| {
            if len == 0 {
                &[][..]
            } else {
                // SAFETY: the host says that the tensor has this many elements of this size, and they stay for `'a`.
                unsafe { std::slice::from_raw_parts(described.data.cast_const(), len) }
            }
        });
        Ok(Tensor {
            dims: described.dims,
            element: described.element,
            bytes,
        })
    }

    pub fn dims(&self) -> &[usize] {
        &self.dims
    }

    pub fn element(&self) -> ElementType {
        self.element
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.dims.iter().product()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The tensor's memory; `None` if its type is one we cannot read.
    pub fn bytes(&self) -> Option<&'a [u8]> {
        self.bytes
    }

    /// The elements as `T`; `None` if that is not the tensor's type.
    pub fn as_slice<T: Scalar>(&self) -> Option<&'a [T]> {
        let bytes = self.bytes.filter(|_| self.element == T::ELEMENT)?;
        // SAFETY: every bit pattern is a `T` (`Scalar`); a misaligned prefix is refused below.
        let (before, elements, after) = unsafe { bytes.align_to::<T>() };
        (before.is_empty() && after.is_empty()).then_some(elements)
    }
}

/// A tensor that is written.
#[derive(Debug)]
pub struct TensorMut<'a> {
    element: ElementType,
    bytes: Option<&'a mut [u8]>,
}

impl<'a> TensorMut<'a> {
    /// # Safety
    /// As [`Tensor::new`], and nobody else reads or writes the tensor during `'a`.
    pub(crate) unsafe fn new(host: &Host, value: *mut OrtValue) -> Result<Self, Error> {
        // SAFETY: the caller's promise.
        let described = unsafe { describe(host, value.cast_const())? };
        let bytes = described.len.map(|len| {
            if len == 0 {
                &mut [][..]
            } else {
                // SAFETY: as in `Tensor::new`. The memory comes from the host's allocator; whatever it holds, every
                // bit pattern is a valid byte and a valid `Scalar`.
                unsafe { std::slice::from_raw_parts_mut(described.data, len) }
            }
        });
        Ok(TensorMut {
            element: described.element,
            bytes,
        })
    }

    /// The tensor's memory; `None` if its type is one we cannot write.
    pub fn bytes(&mut self) -> Option<&mut [u8]> {
        self.bytes.as_deref_mut()
    }

    /// The elements as `T`; `None` if that is not the tensor's type.
    pub fn as_mut_slice<T: Scalar>(&mut self) -> Option<&mut [T]> {
        if self.element != T::ELEMENT {
            return None;
        }
        let bytes = self.bytes.as_deref_mut()?;
        // SAFETY: every bit pattern is a `T` (`Scalar`); a misaligned prefix is refused below.
        let (before, elements, after) = unsafe { bytes.align_to_mut::<T>() };
        (before.is_empty() && after.is_empty()).then_some(elements)
    }
}

/// A tensor that this process may not be able to read: it lies in the memory of an execution provider's device.
///
/// The address is a number until somebody gives it to that device.
#[derive(Clone, Debug)]
pub struct DeviceTensor<'a> {
    dims: Vec<usize>,
    element: ElementType,
    address: *mut u8,
    lifetime: std::marker::PhantomData<&'a ()>,
}

impl DeviceTensor<'_> {
    /// # Safety
    /// `value` is a live tensor of `host` for as long as the result.
    pub(crate) unsafe fn new(host: &Host, value: *const OrtValue) -> Result<Self, Error> {
        // SAFETY: the caller's promise.
        let described = unsafe { describe(host, value)? };
        Ok(DeviceTensor {
            dims: described.dims,
            element: described.element,
            address: described.data,
            lifetime: std::marker::PhantomData,
        })
    }

    pub fn dims(&self) -> &[usize] {
        &self.dims
    }

    pub fn element(&self) -> ElementType {
        self.element
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.dims.iter().product()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Where it begins; for inputs not to be written.
    pub fn address(&self) -> *mut u8 {
        self.address
    }
}

/// A tensor as the host describes it.
struct Described {
    dims: Vec<usize>,
    element: ElementType,
    data: *mut u8,
    /// Bytes; `None` for types without a known size.
    len: Option<usize>,
}

///
/// # Safety
/// `value` is a live tensor of `host`.
unsafe fn describe(host: &Host, value: *const OrtValue) -> Result<Described, Error> {
    let mut info: *mut OrtTensorTypeAndShapeInfo = std::ptr::null_mut();
    // SAFETY: a live tensor, and a place for the answer.
    host.check(unsafe { function!(host, GetTensorTypeAndShape)(value, &mut info) })?;
    if info.is_null() {
        return Err(no_reply_error("a tensor's type and shape"));
    }
    // SAFETY: `info` was just made by the host.
    let described = unsafe { dims_and_element(host, info) };
    // SAFETY: made above, released once.
    unsafe { function!(host, ReleaseTensorTypeAndShapeInfo)(info) };
    let (dims, element) = described?;
    let len = match element.size() {
        None => {
            return Ok(Described {
                dims,
                element,
                data: std::ptr::null_mut(),
                len: None,
            });
        }
        Some(size) => dims
            .iter()
            .try_fold(size, |bytes, &dim| bytes.checked_mul(dim))
            .ok_or_else(|| Error::invalid(format!("the tensor shape {dims:?} overflows")))?,
    };
    let mut data: *mut std::ffi::c_void = std::ptr::null_mut();
    // SAFETY: a live tensor of plain elements. "Mutable" is only the name of the one accessor there is.
    host.check(unsafe { function!(host, GetTensorMutableData)(value.cast_mut(), &mut data) })?;
    if data.is_null() && len > 0 {
        return Err(Error::invalid("the tensor has no memory on the CPU"));
    }
    Ok(Described {
        dims,
        element,
        data: data.cast(),
        len: Some(len),
    })
}

/// # Safety
/// `info` is a live object of `host`.
pub(crate) unsafe fn dims_and_element(
    host: &Host,
    info: *const OrtTensorTypeAndShapeInfo,
) -> Result<(Vec<usize>, ElementType), Error> {
    let mut rank = UNWRITTEN;
    // SAFETY: live info, place for the answer.
    host.check(unsafe { function!(host, GetDimensionsCount)(info, &mut rank) })?;
    let rank = require_reply(rank, "a tensor's rank")?;
    // −1 is refused below.
    let mut dims = vec![-1i64; rank];
    // SAFETY: room for `rank` numbers.
    host.check(unsafe { function!(host, GetDimensions)(info, dims.as_mut_ptr(), rank) })?;
    // Read as a number: a newer host may answer with a type that our enum does not have.
    let mut element = 0i32;
    // SAFETY: the enum is `repr(i32)`, and only the host writes through the pointer.
    host.check(unsafe {
        function!(host, GetTensorElementType)(info, std::ptr::from_mut(&mut element).cast())
    })?;
    let dims = dims
        .into_iter()
        .map(|dim| {
            usize::try_from(dim).map_err(|_| Error::invalid(format!("a tensor dimension is {dim}")))
        })
        .collect::<Result<_, _>>()?;
    Ok((dims, ElementType::from_raw(element)))
}
