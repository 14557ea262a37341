//! The host: one ONNX Runtime that loaded this library, and the version of its function table.
//!
//! Owns how that table is read: field by field and never above the host's version. A `&OrtApi` is never formed,
//! since an older host's table is shorter than our struct.

use std::ffi::{CStr, CString};

use ort_sys::{OrtApi, OrtApiBase, OrtErrorCode, OrtStatusPtr};

use super::error::{Code, Error};

/// The oldest function table that has everything we call (`KernelContext_ParallelFor`).
pub const MIN_API: u32 = 17;

/// A host's function table.
///
/// Kept with every object that comes from the host rather than in a global: two copies of ONNX Runtime may live in
/// one process and share this library.
#[derive(Clone, Copy, Debug)]
pub struct Host {
    api: *const OrtApi,
}

// SAFETY: the table is immutable, 'static data of the host's library, and its functions may be called from any thread.
unsafe impl Send for Host {}
// SAFETY: as above.
unsafe impl Sync for Host {}

/// Reads one function pointer of the host's table.
///
/// Evaluates to the function, which is still unsafe to call. Only fields of API 17 exist in our `OrtApi`
/// (feature `api-17` of ort-sys), so none beyond the end of a host's table can be named here.
macro_rules! function {
    ($host:expr, $name:ident) => {{
        let api = $host.table();
        // Most callers are inside an unsafe block already, for the call itself.
        #[allow(unused_unsafe)]
        // SAFETY: `Host::new` keeps tables of at least API 17 only, and our `OrtApi` ends there, so the field lies
        // inside the host's table. `addr_of!` makes no reference to the table.
        let function = unsafe { std::ptr::addr_of!((*api).$name).read() };
        function
    }};
}
pub(crate) use function;

impl Host {
    /// The table of the host behind `base`.
    ///
    /// # Errors
    /// A status made by the host if it is older than 1.17; a null status is never returned as an error unless the
    /// host cannot even make one.
    ///
    /// # Safety
    /// `base` is the pointer that ONNX Runtime handed to `RegisterCustomOps`.
    pub unsafe fn new(base: *const OrtApiBase) -> Result<Host, OrtStatusPtr> {
        // SAFETY: the caller's promise. Both fields exist since the first release.
        let (get_api, get_version) = unsafe { ((*base).GetApi, (*base).GetVersionString) };
        // SAFETY: returns a static, NUL-terminated string.
        let version = unsafe { CStr::from_ptr(get_version()) }.to_string_lossy();
        // Ask only after looking at the version: GetApi above the host's version prints to stderr and returns null.
        if let Some(minor) = minor_version(&version)
            && minor >= MIN_API
        {
            // SAFETY: plain call into the host.
            let api = unsafe { get_api(MIN_API) };
            if !api.is_null() {
                return Ok(Host { api });
            }
        }
        // SAFETY: API 1 exists in every release.
        let oldest = unsafe { get_api(1) };
        if oldest.is_null() {
            return Err(OrtStatusPtr(std::ptr::null_mut()));
        }
        let message = CString::new(format!(
            "ditfastattn: this library needs ONNX Runtime 1.{MIN_API} or newer, the host is {version}; \
             upgrade onnxruntime, or run the model that was not rewritten"
        ))
        .unwrap_or_default();
        // SAFETY: CreateStatus is the first field of every version of the table and copies the message.
        Err(unsafe {
            let create = std::ptr::addr_of!((*oldest).CreateStatus).read();
            create(OrtErrorCode::ORT_FAIL, message.as_ptr())
        })
    }

    pub(crate) fn table(&self) -> *const OrtApi {
        self.api
    }

    /// Turns a status of the host into a result and releases it.
    ///
    /// A host without memory for a status says that all is well. So whoever asks it for something looks whether that
    /// came, and else says [`no_reply_error`].
    pub(crate) fn check(&self, status: OrtStatusPtr) -> Result<(), Error> {
        if status.0.is_null() {
            return Ok(());
        }
        let message = function!(self, GetErrorMessage);
        let release = function!(self, ReleaseStatus);
        // SAFETY: a non-null status of this host, used until released once; the message is copied before that.
        let text = unsafe {
            let text = CStr::from_ptr(message(status.0))
                .to_string_lossy()
                .into_owned();
            release(status.0);
            text
        };
        Err(Error::new(Code::Fail, text))
    }
}

/// A call that the host neither did nor reported.
pub(crate) fn no_reply_error(what: &str) -> Error {
    Error::new(
        Code::RuntimeException,
        format!("ONNX Runtime did not give {what}, and had no memory to say why"),
    )
}

/// What the host wrote, if it wrote anything.
pub(crate) fn require_reply(count: usize, what: &str) -> Result<usize, Error> {
    match count {
        UNWRITTEN => Err(no_reply_error(what)),
        count => Ok(count),
    }
}

/// Where the host is to write a count, before.
pub(crate) const UNWRITTEN: usize = usize::MAX;

/// `1.32.0` → 32; hosts of another major version are newer than anything tried, and their minor is unknown.
fn minor_version(version: &str) -> Option<u32> {
    let mut parts = version.split('.');
    let major: u32 = parts.next()?.parse().ok()?;
    let minor: u32 = parts.next()?.parse().ok()?;
    match major {
        1 => Some(minor),
        0 => None,
        _ => Some(u32::MAX),
    }
}

#[cfg(test)]
mod tests {
    use super::{Host, minor_version};
    use ort_sys::{OrtApi, OrtApiBase, OrtErrorCode, OrtStatusPtr};
    use std::ffi::{CStr, c_char};
    use std::mem::MaybeUninit;
    use std::sync::atomic::{AtomicU32, Ordering};

    /// The highest table that the made-up host was asked for.
    static ASKED: AtomicU32 = AtomicU32::new(0);

    /// A status is a leaked copy of its message.
    unsafe extern "system" fn create_status(_: OrtErrorCode, text: *const c_char) -> OrtStatusPtr {
        // SAFETY: the caller passes a NUL-terminated string.
        let copy = unsafe { CStr::from_ptr(text) }.to_owned();
        OrtStatusPtr(copy.into_raw().cast())
    }

    unsafe extern "system" fn old_table(version: u32) -> *const OrtApi {
        ASKED.fetch_max(version, Ordering::Relaxed);
        // As an old host's table: only its first field is ours to read.
        let table: &mut MaybeUninit<OrtApi> = Box::leak(Box::new(MaybeUninit::zeroed()));
        let table = table.as_mut_ptr();
        // SAFETY: a place inside memory that was just made.
        unsafe { std::ptr::addr_of_mut!((*table).CreateStatus).write(create_status) };
        table
    }

    unsafe extern "system" fn no_table(_: u32) -> *const OrtApi {
        std::ptr::null()
    }

    unsafe extern "system" fn old_version() -> *const c_char {
        c"1.16.3".as_ptr()
    }

    #[test]
    fn too_old_a_host_gets_a_status_that_names_both_versions() {
        let base = OrtApiBase {
            GetApi: old_table,
            GetVersionString: old_version,
        };
        // SAFETY: a base with both functions.
        let status = unsafe { Host::new(&base) }.expect_err("1.16 lacks what we call");
        // SAFETY: `create_status` made it of a C string.
        let text = unsafe { CStr::from_ptr(status.0.cast()) }
            .to_str()
            .expect("text");
        assert!(text.contains("needs ONNX Runtime 1.17 or newer"), "{text}");
        assert!(text.contains("the host is 1.16.3"), "{text}");
        // A host prints to stderr when it is asked for a table that it does not have.
        assert_eq!(ASKED.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn a_host_without_any_table_gets_no_status_and_no_crash() {
        let base = OrtApiBase {
            GetApi: no_table,
            GetVersionString: old_version,
        };
        // SAFETY: a base with both functions.
        let status = unsafe { Host::new(&base) }.expect_err("nothing to call");
        assert!(status.0.is_null());
    }

    #[test]
    fn versions_are_read_from_the_string() {
        assert_eq!(minor_version("1.32.0"), Some(32));
        assert_eq!(minor_version("1.16.3-dev+abc"), Some(16));
        assert_eq!(minor_version("2.0.0"), Some(u32::MAX));
        assert_eq!(minor_version("0.9.1"), None);
        assert_eq!(minor_version(""), None);
        assert_eq!(minor_version("nightly"), None);
    }
}
