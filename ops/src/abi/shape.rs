//! Shape inference: what a node's inputs look like before anything runs, and what its outputs will look like.
//!
//! Only says what is certain. The host ignores errors here, so nothing is validated; a dimension that is neither a
//! number nor a name is left unknown together with its whole shape.

use std::ffi::{CStr, CString, c_char};

use ort_sys::{OrtOpAttr, OrtOpAttrType, OrtShapeInferContext, OrtTensorTypeAndShapeInfo};

use super::host::{Host, function};
use super::status::Error;

/// A dimension as far as the graph knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Dim {
    Size(i64),
    Name(String),
}

/// A node whose outputs' shapes are asked for.
#[derive(Debug)]
pub struct InferContext<'a> {
    host: &'a Host,
    raw: *mut OrtShapeInferContext,
}

impl<'a> InferContext<'a> {
    /// # Safety
    /// `raw` is the context of a shape inference call that lasts for `'a`.
    pub(crate) unsafe fn new(host: &'a Host, raw: *mut OrtShapeInferContext) -> Self {
        InferContext { host, raw }
    }

    /// The shape of input `index`; `None` if any part of it is unknown.
    pub fn input(&self, index: usize) -> Result<Option<Vec<Dim>>, Error> {
        let mut count = 0;
        // SAFETY: the context is live for `'a`, here and below.
        self.host.check(unsafe {
            function!(self.host, ShapeInferContext_GetInputCount)(self.raw, &mut count)
        })?;
        if index >= count {
            return Ok(None);
        }
        let mut info: *mut OrtTensorTypeAndShapeInfo = std::ptr::null_mut();
        // SAFETY: the index is in range. The info stays the context's: it must not be released.
        self.host.check(unsafe {
            function!(self.host, ShapeInferContext_GetInputTypeShape)(self.raw, index, &mut info)
        })?;
        if info.is_null() {
            return Ok(None);
        }
        let mut rank = 0;
        // SAFETY: `info` belongs to the live context.
        self.host
            .check(unsafe { function!(self.host, GetDimensionsCount)(info, &mut rank) })?;
        let mut sizes = vec![0i64; rank];
        let mut names: Vec<*const c_char> = vec![std::ptr::null(); rank];
        // SAFETY: room for `rank` entries in both lists.
        self.host.check(unsafe {
            function!(self.host, GetDimensions)(info, sizes.as_mut_ptr(), rank)
        })?;
        // SAFETY: as above; the names point into `info`.
        self.host.check(unsafe {
            function!(self.host, GetSymbolicDimensions)(info, names.as_mut_ptr(), rank)
        })?;
        let dims = sizes.into_iter().zip(names).map(|(size, name)| {
            if size >= 0 {
                return Some(Dim::Size(size));
            }
            if name.is_null() {
                return None;
            }
            // SAFETY: a NUL-terminated string inside `info`, copied here.
            let name = unsafe { CStr::from_ptr(name) }.to_string_lossy();
            (!name.is_empty()).then(|| Dim::Name(name.into_owned()))
        });
        // Hosts report an unknown rank as rank 0; our ops have no scalar inputs whose shape would matter.
        Ok(dims
            .collect::<Option<Vec<_>>>()
            .filter(|dims| !dims.is_empty()))
    }

    /// A string attribute of at most 63 bytes; `None` if absent or longer.
    pub fn string(&self, name: &CStr) -> Option<String> {
        let mut buffer = [0u8; 64];
        let mut attribute: *const OrtOpAttr = std::ptr::null();
        // SAFETY: live context, NUL-terminated name.
        let found = self.host.check(unsafe {
            function!(self.host, ShapeInferContext_GetAttribute)(
                self.raw,
                name.as_ptr(),
                &mut attribute,
            )
        });
        if found.is_err() || attribute.is_null() {
            return None;
        }
        let mut needed = 0;
        // SAFETY: the host writes no more than the buffer's length and fails if it would need to.
        let read = self.host.check(unsafe {
            function!(self.host, ReadOpAttr)(
                attribute,
                OrtOpAttrType::ORT_OP_ATTR_STRING,
                buffer.as_mut_ptr().cast(),
                buffer.len(),
                &mut needed,
            )
        });
        read.ok()?;
        let text = CStr::from_bytes_until_nul(&buffer).ok()?;
        Some(text.to_str().ok()?.to_owned())
    }

    /// Says that output `index` has this shape. The node must have that output: older hosts abort otherwise.
    pub fn set_output(&self, index: usize, dims: &[Dim]) -> Result<(), Error> {
        let sizes: Vec<i64> = dims
            .iter()
            .map(|dim| match dim {
                Dim::Size(size) => *size,
                Dim::Name(_) => -1,
            })
            .collect();
        let names: Vec<CString> = dims
            .iter()
            .map(|dim| match dim {
                Dim::Size(_) => CString::default(),
                Dim::Name(name) => CString::new(name.as_str()).unwrap_or_default(),
            })
            .collect();
        let mut name_pointers: Vec<*const c_char> = names.iter().map(|n| n.as_ptr()).collect();
        let mut info: *mut OrtTensorTypeAndShapeInfo = std::ptr::null_mut();
        // SAFETY: a place for the new object, released below.
        self.host
            .check(unsafe { function!(self.host, CreateTensorTypeAndShapeInfo)(&mut info) })?;
        let mut set = || -> Result<(), Error> {
            // SAFETY: `info` is live; the lists have `dims.len()` entries and are copied.
            self.host.check(unsafe {
                function!(self.host, SetDimensions)(info, sizes.as_ptr(), sizes.len())
            })?;
            // SAFETY: as above; `names` outlives the call.
            self.host.check(unsafe {
                function!(self.host, SetSymbolicDimensions)(
                    info,
                    name_pointers.as_mut_ptr(),
                    name_pointers.len(),
                )
            })?;
            // SAFETY: live context and info; the shape is copied.
            self.host.check(unsafe {
                function!(self.host, ShapeInferContext_SetOutputTypeShape)(self.raw, index, info)
            })
        };
        let result = set();
        // SAFETY: made above, released once.
        unsafe { function!(self.host, ReleaseTensorTypeAndShapeInfo)(info) };
        result
    }
}
