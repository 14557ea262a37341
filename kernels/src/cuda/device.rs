//! One CUDA device: its context, its kernels, its memory for caches.

use std::collections::HashMap;
use std::ffi::c_void;
use std::ptr::null_mut;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use cudarc::driver::sys;

use super::choose::Limits;
use super::driver::{CudaError, Current, Event, Stream, c_name, driver, is_available};
use super::flags::Flags;
use super::image::Images;
use super::params::Params;
use super::variant::Variant;

/// A device. Made once per ordinal and never freed: the driver may be gone before this library is.
#[derive(Debug)]
pub struct Device {
    pub limits: Limits,
    /// Compute capability, 90 for 9.0.
    pub arch: u32,
    processors: u32,
    pub(super) context: sys::CUcontext,
    /// Memory for caches; `None` if the device has no stream-ordered allocator.
    pub(super) pool: Option<sys::CUmemoryPool>,
    /// Where memory is freed: a stream of our own, which waits for whoever used it.
    pub(super) reaper: Stream,
    pub(super) flags: Mutex<Flags>,
    images: Images,
    functions: Mutex<HashMap<Variant, Result<Function, CudaError>>>,
    modules: Mutex<HashMap<String, Module>>,
}

// SAFETY: the driver's objects may be used from any thread; everything else is behind locks.
unsafe impl Send for Device {}
// SAFETY: as above.
unsafe impl Sync for Device {}

#[derive(Clone, Copy, Debug)]
struct Function(sys::CUfunction);

#[derive(Clone, Copy, Debug)]
struct Module(sys::CUmodule);

/// Freed cache memory up to this size stays with the process, so that the next generation finds it.
const KEPT_BYTES: u64 = 1 << 30;

impl Device {
    /// The device of a stream; for the default stream that of the thread's current context, else device 0.
    ///
    /// # Errors
    /// If there is no driver, no device, or it cannot be used.
    pub fn of(stream: Stream) -> Result<&'static Device, CudaError> {
        if !is_available() {
            return Err(CudaError::NoDriver);
        }
        let mut context = null_mut();
        // SAFETY: a live stream, places for the answers. `cuInit` may be called again and again.
        unsafe {
            driver!(cuInit(0))?;
            if stream.0.is_null() {
                driver!(cuCtxGetCurrent(&mut context))?;
            } else {
                driver!(cuStreamGetCtx(stream.0, &mut context))?;
            }
        }
        if context.is_null() {
            return Device::get(0);
        }
        let _current = Current::new(context)?;
        let mut device = 0;
        // SAFETY: a context is current.
        unsafe { driver!(cuCtxGetDevice(&mut device))? };
        Device::get(device)
    }

    /// Device number `ordinal`.
    fn get(ordinal: i32) -> Result<&'static Device, CudaError> {
        static DEVICES: OnceLock<Mutex<HashMap<i32, &'static Device>>> = OnceLock::new();
        let devices = DEVICES.get_or_init(Mutex::default);
        let mut devices = devices.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(device) = devices.get(&ordinal) {
            return Ok(device);
        }
        let device: &'static Device = Box::leak(Box::new(Device::open(ordinal)?));
        devices.insert(ordinal, device);
        Ok(device)
    }

    fn open(ordinal: i32) -> Result<Device, CudaError> {
        use sys::CUdevice_attribute as A;
        let mut device = 0;
        let mut context = null_mut();
        // SAFETY: places for the answers.
        unsafe {
            driver!(cuDeviceGet(&mut device, ordinal))?;
            driver!(cuDevicePrimaryCtxRetain(&mut context, device))?;
        }
        let attribute = |attribute| {
            let mut value = 0;
            // SAFETY: as above.
            unsafe { driver!(cuDeviceGetAttribute(&mut value, attribute, device))? };
            Ok(u32::try_from(value).unwrap_or(0))
        };
        let arch = attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)? * 10
            + attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        let shared = attribute(A::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        let _current = Current::new(context)?;
        let mut reaper = null_mut();
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: a place for the answer.
        unsafe { driver!(cuStreamCreate(&mut reaper, flags))? };
        let pools = attribute(A::CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED)? != 0;
        Ok(Device {
            limits: Limits {
                shared_bytes: shared as usize,
                tensor_cores: arch >= 80,
            },
            arch,
            processors: attribute(A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            context,
            pool: if pools { make_pool(device).ok() } else { None },
            reaper: Stream(reaper),
            flags: Mutex::new(Flags::default()),
            images: Images::from_environment(),
            functions: Mutex::default(),
            modules: Mutex::default(),
        })
    }

    /// Launches a kernel on `stream`, loading it if need be.
    ///
    /// # Errors
    /// If there is no code for it, or the driver refuses.
    ///
    /// # Safety
    /// The parameters are what the kernel's documentation in `kernels/cuda` demands; memory that they point to is live
    /// until the stream has come past the launch, and ordered against other uses of it.
    pub unsafe fn launch<P: Params>(
        &self,
        stream: Stream,
        variant: &Variant,
        blocks: u32,
        params: &P,
    ) -> Result<(), CudaError> {
        let _current = Current::new(self.context)?;
        let function = self.function(variant)?;
        let mut arguments = [std::ptr::from_ref(params).cast_mut().cast::<c_void>()];
        // SAFETY: the kernel takes one parameter, of type `P`, which the driver copies; the rest is the caller's promise.
        unsafe {
            driver!(cuLaunchKernel(
                function.0,
                blocks,
                1,
                1,
                variant.threads() as u32,
                1,
                1,
                variant.shared_bytes() as u32,
                stream.0,
                arguments.as_mut_ptr(),
                null_mut(),
            ))
        }
    }

    /// Loads a kernel, so that its first launch does not have to.
    ///
    /// # Errors
    /// As [`Device::launch`].
    pub fn prepare(&self, variant: &Variant) -> Result<(), CudaError> {
        let _current = Current::new(self.context)?;
        self.function(variant).map(|_| ())
    }

    /// Blocks that keep the device busy with simple work over `items` pieces, 256 threads each.
    pub(super) fn blocks_for(&self, items: u64) -> u32 {
        let most = u64::from(self.processors) * 8;
        items.div_ceil(256).clamp(1, most.max(1)) as u32
    }

    /// Needs the device's context to be current.
    fn function(&self, variant: &Variant) -> Result<Function, CudaError> {
        let mut functions = self
            .functions
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = functions.get(variant) {
            return known.clone();
        }
        let found = self.load(variant);
        functions.insert(*variant, found.clone());
        found
    }

    fn load(&self, variant: &Variant) -> Result<Function, CudaError> {
        let module = self.module(variant)?;
        let name = c_name(&variant.name());
        let mut function = null_mut();
        // SAFETY: a live module, a NUL-terminated name, a place for the answer.
        unsafe { driver!(cuModuleGetFunction(&mut function, module.0, name.as_ptr()))? };
        let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: a live function.
        unsafe {
            driver!(cuFuncSetAttribute(
                function,
                attribute,
                variant.shared_bytes() as i32
            ))?;
        }
        Ok(Function(function))
    }

    fn module(&self, variant: &Variant) -> Result<Module, CudaError> {
        let mut modules = self.modules.lock().unwrap_or_else(PoisonError::into_inner);
        let ahead = self.images.ahead_of_time(variant);
        let key = if ahead.is_some() {
            variant.module()
        } else {
            variant.name()
        };
        if let Some(module) = modules.get(&key) {
            return Ok(*module);
        }
        let module = match ahead {
            Some(image) => load_module(&image)?,
            None => self.images.compiled(variant, self.arch, load_module)?,
        };
        modules.insert(key, module);
        Ok(module)
    }
}

fn load_module(image: &Arc<[u8]>) -> Result<Module, CudaError> {
    let mut module = null_mut();
    // SAFETY: a fatbin or cubin; the driver finds its length in it and copies it. One of those is always longer than its
    // header, and `Images` gives out nothing else.
    unsafe { driver!(cuModuleLoadData(&mut module, image.as_ptr().cast()))? };
    Ok(Module(module))
}

fn make_pool(device: sys::CUdevice) -> Result<sys::CUmemoryPool, CudaError> {
    let mut pool = null_mut();
    // SAFETY: all-zero properties are the defaults; the kind and place are filled in.
    unsafe {
        let mut properties: sys::CUmemPoolProps = std::mem::zeroed();
        properties.allocType = sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED;
        properties.location.type_ = sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE;
        properties.location.id = device;
        driver!(cuMemPoolCreate(&mut pool, &properties))?;
        let mut kept = KEPT_BYTES;
        driver!(cuMemPoolSetAttribute(
            pool,
            sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD,
            std::ptr::from_mut(&mut kept).cast(),
        ))?;
    }
    Ok(pool)
}

/// Copies between places of device memory, in the order of the stream.
///
/// # Errors
/// If the driver refuses.
///
/// # Safety
/// Both places have `bytes` bytes and do not overlap; they are live until the stream has come past the copy, and ordered
/// against other uses of them.
pub unsafe fn copy(
    stream: Stream,
    from: *const c_void,
    to: *mut c_void,
    bytes: usize,
) -> Result<(), CudaError> {
    if bytes == 0 {
        return Ok(());
    }
    // SAFETY: the caller's promise.
    unsafe {
        driver!(cuMemcpyDtoDAsync_v2(
            to.addr() as u64,
            from.addr() as u64,
            bytes,
            stream.0
        ))
    }
}

/// A moment on the device's own stream, after which nobody uses what `event` stands for.
pub(super) fn retire(device: &Device, event: &Event) -> Result<(), CudaError> {
    event.delay(device.reaper)
}
