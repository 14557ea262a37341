//! The host side of CUDA on an emulated driver, whose streams do nothing until somebody waits for them.

mod common;

use std::ffi::{CString, c_int, c_void};
use std::ptr::null_mut;
use std::sync::LazyLock;

use common::*;
use ditfastattn_emulator::{Sources, image_folder};
use ditfastattn_kernels::cuda::{Buffer, CudaError, Device, Stream, copy};
use ditfastattn_kernels::*;
use half::{bf16, f16};

/// The emulated driver's own functions.
struct Driver {
    library: *mut c_void,
}

// SAFETY: a handle of the loader's.
unsafe impl Send for Driver {}
// SAFETY: as above.
unsafe impl Sync for Driver {}

static DRIVER: LazyLock<Driver> = LazyLock::new(|| {
    // SAFETY: tests of this file start by coming here, before anybody reads these variables on another thread.
    unsafe {
        std::env::set_var("DITFASTATTN_CUDA_KERNELS", image_folder());
        std::env::set_var("DITFASTATTN_CUDA_CACHE", "");
    }
    let path = Sources::new().driver().join("libcuda.so.1");
    let path = CString::new(path.to_str().expect("UTF-8")).expect("no NUL");
    // SAFETY: a library of ours. Whoever asks for `libcuda.so.1` by name gets this one from now on.
    let library = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
    assert!(!library.is_null());
    Driver { library }
});

impl Driver {
    fn function(&self, name: &str) -> *mut c_void {
        let name = CString::new(name).expect("no NUL");
        // SAFETY: a loaded library.
        let function = unsafe { libc::dlsym(self.library, name.as_ptr()) };
        assert!(!function.is_null(), "{name:?}");
        function
    }

    fn call(&self, name: &str, stream: *mut c_void, argument: c_int) {
        // SAFETY: functions of the driver that take a stream and perhaps a number.
        let function: extern "C" fn(*mut c_void, c_int) -> c_int =
            unsafe { std::mem::transmute(self.function(name)) };
        assert_eq!(function(stream, argument), 0);
    }
}

/// A stream of the emulated driver's. Leaked: buffers may outlive the test.
struct Lazy(*mut c_void);

impl Lazy {
    fn new() -> Self {
        // SAFETY: `cuStreamCreate`.
        let create: extern "C" fn(*mut *mut c_void, u32) -> c_int =
            unsafe { std::mem::transmute(DRIVER.function("cuStreamCreate")) };
        let mut stream = null_mut();
        assert_eq!(create(&mut stream, 0), 0);
        Lazy(stream)
    }

    fn stream(&self) -> Stream {
        // SAFETY: live for ever.
        unsafe { Stream::from_raw(self.0) }
    }

    fn device(&self) -> &'static Device {
        Device::of(self.stream()).expect("the emulated device")
    }

    fn wait(&self) {
        DRIVER.call("cuStreamSynchronize", self.0, 0);
    }
}

fn address<T>(values: &mut [T]) -> *mut c_void {
    values.as_mut_ptr().cast()
}

fn put(buffer: &Buffer, stream: Stream, values: &mut [u8]) {
    // SAFETY: `values` has as many bytes as the buffer and lives until the test has waited.
    let enqueue = |to| unsafe { copy(stream, address(values), to, values.len()) };
    buffer.on(stream, enqueue).expect("enqueued");
}

fn get(buffer: &Buffer, stream: Stream, values: &mut [u8]) {
    // SAFETY: as above.
    let enqueue = |from: *mut c_void| unsafe { copy(stream, from, address(values), values.len()) };
    buffer.on(stream, enqueue).expect("enqueued");
}

#[test]
fn a_buffer_may_be_written_on_one_stream_and_read_and_freed_while_another_works() {
    let (writer, reader) = (Lazy::new(), Lazy::new());
    let mut from: Vec<u8> = (0..200).map(|i| i as u8).collect();
    let mut to = vec![0; 200];
    let buffer = Buffer::allocate(writer.device(), writer.stream(), 200).expect("memory");
    put(&buffer, writer.stream(), &mut from);
    get(&buffer, reader.stream(), &mut to);
    drop(buffer);
    assert_eq!(to, [0; 200], "nobody has waited yet");
    reader.wait();
    assert_eq!(to, from);
}

#[test]
fn a_later_write_waits_for_the_reader() {
    let (writer, reader) = (Lazy::new(), Lazy::new());
    let (mut one, mut two) = (vec![1; 64], vec![2; 64]);
    let mut seen = vec![0; 64];
    let buffer = Buffer::allocate(writer.device(), writer.stream(), 64).expect("memory");
    put(&buffer, writer.stream(), &mut one);
    get(&buffer, reader.stream(), &mut seen);
    put(&buffer, writer.stream(), &mut two);
    writer.wait();
    assert_eq!(seen, one, "the second write came after the reader");
}

/// Were uses not ordered, the emulated driver would show it.
#[test]
fn unordered_streams_read_what_was_not_written() {
    let (writer, reader) = (Lazy::new(), Lazy::new());
    let mut place = vec![0u8; 64];
    let (mut from, mut to) = (vec![1u8; 64], vec![0u8; 64]);
    // SAFETY: all vectors live until both streams are waited for. Nothing orders the two copies, which is the point; the
    // emulated driver runs them one after the other.
    unsafe {
        copy(writer.stream(), address(&mut from), address(&mut place), 64).expect("enqueued");
        copy(reader.stream(), address(&mut place), address(&mut to), 64).expect("enqueued");
    }
    reader.wait();
    assert_eq!(to, [0; 64]);
    writer.wait();
}

#[test]
fn capture_into_a_graph_is_refused() {
    let stream = Lazy::new();
    assert_eq!(stream.stream().refuse_capture(), Ok(()));
    DRIVER.call("emulator_capture", stream.0, 1);
    let error = stream.stream().refuse_capture().expect_err("refused");
    assert_eq!(error, CudaError::Capturing);
    assert!(error.to_string().contains("enable_cuda_graph=0"), "{error}");
}

/// The call as the product makes it: choice, launch, capture into a buffer, then window attention from it on another stream.
fn capture_then_window<T: Element>(bad: bool) -> (bool, f64) {
    let (first, second) = (Lazy::new(), Lazy::new());
    let device = first.device();
    let s = shape(1, 2, 130, 64);
    let mut p = Problem::<T>::new(Kind::Capture, s, Band::new(16), [Layout::Bhsd; 4], 5);
    if bad {
        p.v.data[3] = T::from_f32(f32::NAN);
    }
    let want = p.oracle().out;
    let buffer = Buffer::allocate(device, first.stream(), size_of_val(&p.residual.data[..]));
    let buffer = buffer.expect("memory");
    let strides = p.residual.strides;
    let call = |p: &mut Problem<T>, stream: &Lazy, mode: Mode<'_>| {
        let a = Attention {
            shape: s,
            scale: p.scale,
            q: p.q.input(),
            k: p.k.input(),
            v: p.v.input(),
            mask: None,
            out: p.out.output(),
            mode,
        };
        // SAFETY: the tensors live until the streams have been waited for; the buffer's uses are ordered.
        unsafe { device.attention(stream.stream(), &a, buffer.non_finite()) }
    };
    let band = p.band;
    let captured = buffer.on(first.stream(), |address| {
        // SAFETY: the buffer has room for the residual.
        let residual = unsafe { Output::from_raw(address.cast(), T::DTYPE, strides) };
        call(&mut p, &first, Mode::FullCapture { band, residual })
    });
    captured.expect("enqueued");
    let windowed = buffer.on(second.stream(), |address| {
        // SAFETY: as above.
        let residual = Some(unsafe { Input::from_raw(address.cast(), T::DTYPE, strides) });
        call(&mut p, &second, Mode::Window { band, residual })
    });
    windowed.expect("enqueued");
    second.wait();
    // W + R of the same inputs is O again.
    (buffer.is_finite(), errors(&p.out.values(), &want).0)
}

#[test]
fn a_captured_residual_gives_full_attention_back() {
    for (finite, error) in [
        capture_then_window::<f16>(false),
        capture_then_window::<bf16>(false),
        capture_then_window::<f32>(false),
    ] {
        assert!(finite);
        assert!(error < 2e-2, "{error}");
    }
}

#[test]
fn a_buffer_knows_that_it_holds_a_nan() {
    assert!(!capture_then_window::<f16>(true).0);
    assert!(!capture_then_window::<f32>(true).0);
}

/// A head dimension that nothing is compiled for is computed on plain cores where there is no compiler.
#[test]
fn without_a_compiler_other_head_dimensions_still_work() {
    let stream = Lazy::new();
    let mut p = Problem::<f16>::new(
        Kind::Full,
        shape(1, 1, 70, 40),
        Band::new(0),
        [Layout::Bshd; 4],
        2,
    );
    let want = p.oracle().out;
    // SAFETY: the tensors live until the stream has been waited for.
    p.call(|a| unsafe { stream.device().attention(stream.stream(), a, null_mut()) })
        .expect("enqueued");
    stream.wait();
    assert!(errors(&p.out.values(), &want).0 < 2e-3);
}

fn spread<T: Element + PartialEq + std::fmt::Debug>(
    start: usize,
    count: usize,
    bad: Option<usize>,
) -> bool {
    let stream = Lazy::new();
    let mut x = noise(count as u32);
    let mut from: Vec<T> = (0..start + count).map(|_| T::from_f32(x())).collect();
    if let Some(bad) = bad {
        from[start + bad] = T::from_f32(f32::INFINITY);
    }
    let mut to = vec![vec![T::from_f32(0.0); count + 1]; 2];
    let mut flag = 0u32;
    let places = [null_mut(), address(&mut to[0]), address(&mut to[1])];
    // SAFETY: the vectors live until the stream has been waited for.
    unsafe {
        let source = from.as_ptr().add(start).cast();
        let device = stream.device();
        device.spread(
            stream.stream(),
            T::DTYPE,
            source,
            places,
            count,
            Some(&raw mut flag),
        )
    }
    .expect("enqueued");
    stream.wait();
    for copy in to {
        assert_eq!(copy[..count], from[start..]);
        assert_eq!(copy[count], T::from_f32(0.0));
    }
    flag != 0
}

#[test]
fn copies_of_any_length_and_alignment_find_what_is_not_finite() {
    for start in [0, 1] {
        for count in [1, 7, 8, 1000, 4099] {
            assert!(!spread::<f32>(start, count, None));
            assert!(!spread::<f16>(start, count, None));
            assert!(!spread::<bf16>(start, count, None));
            assert!(spread::<f32>(start, count, Some(count - 1)));
            assert!(spread::<f16>(start, count, Some(count / 2)));
            assert!(spread::<bf16>(start, count, Some(0)));
        }
    }
}
