//! Registration: what happens when ONNX Runtime loads the library for a session.

use std::ffi::CStr;
use std::sync::{Mutex, PoisonError};

use ort_sys::{OrtApiBase, OrtCustomOpDomain, OrtSessionOptions, OrtStatusPtr};

use super::error::Error;
use super::host::{Host, function, no_reply_error};
use super::op::Op;
use super::preallocated_status;
use super::status::guard;

/// A session option that marks options which already have our domain. Adding it again, from this library or from a
/// second copy of it, would make session creation fail with "Domain already set in registry".
const REGISTERED: &CStr = c"ditfastattn.registered";

/// A domain made for one host. Kept for ever: session options hold pointers to it.
struct Domain {
    table: usize,
    raw: *mut OrtCustomOpDomain,
}

// SAFETY: the pointer is only handed back to the host, under the mutex that holds it.
unsafe impl Send for Domain {}

static DOMAINS: Mutex<Vec<Domain>> = Mutex::new(Vec::new());

/// Adds the domain `name` with the operators that `ops` makes to session options.
///
/// Doing so twice for the same options is harmless: the second time nothing happens.
///
/// # Safety
/// `options` and `base` are the arguments of `RegisterCustomOps`.
pub(crate) unsafe fn register(
    options: *mut OrtSessionOptions,
    base: *const OrtApiBase,
    name: &CStr,
    ops: impl FnOnce(Host) -> Vec<&'static Op>,
) -> OrtStatusPtr {
    if options.is_null() || base.is_null() {
        // There is no host that could make a status.
        return OrtStatusPtr(std::ptr::null_mut());
    }
    // SAFETY: the caller's promise.
    let host = match unsafe { Host::new(base) } {
        Ok(host) => host,
        Err(status) => return status,
    };
    preallocated_status::fill(&host);
    guard(&host, || {
        let mut already = 0;
        // SAFETY: live options, a NUL-terminated key.
        host.check(unsafe {
            function!(host, HasSessionConfigEntry)(options, REGISTERED.as_ptr(), &mut already)
        })?;
        if already != 0 {
            return Ok(());
        }
        let domain = domain(&host, name, ops)?;
        // SAFETY: live options; the domain is never freed.
        host.check(unsafe { function!(host, AddCustomOpDomain)(options, domain) })?;
        // SAFETY: live options, NUL-terminated strings that the host copies.
        host.check(unsafe {
            function!(host, AddSessionConfigEntry)(options, REGISTERED.as_ptr(), c"1".as_ptr())
        })
    })
}

/// The domain of this host, made on first use.
fn domain(
    host: &Host,
    name: &CStr,
    ops: impl FnOnce(Host) -> Vec<&'static Op>,
) -> Result<*mut OrtCustomOpDomain, Error> {
    let mut domains = DOMAINS.lock().unwrap_or_else(PoisonError::into_inner);
    let table = host.table() as usize;
    if let Some(known) = domains.iter().find(|domain| domain.table == table) {
        return Ok(known.raw);
    }
    let mut raw = std::ptr::null_mut();
    // SAFETY: a NUL-terminated name, a place for the answer.
    host.check(unsafe { function!(host, CreateCustomOpDomain)(name.as_ptr(), &mut raw) })?;
    if raw.is_null() {
        return Err(no_reply_error("a domain for operators"));
    }
    for op in ops(*host) {
        // SAFETY: a live domain; the op is never freed.
        host.check(unsafe { function!(host, CustomOpDomain_Add)(raw, op.raw()) })?;
    }
    domains.push(Domain { table, raw });
    Ok(raw)
}
