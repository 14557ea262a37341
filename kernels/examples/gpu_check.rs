//! The kernels on a real device: against the definition, and their speed. Needs a GPU and its driver, nothing else.
//!
//!     gpu_check device             what device it is, as JSON
//!     gpu_check verify [--small]   every mode, type, head dimension, ragged length and mask against the oracle
//!     gpu_check time               TFLOP/s of each mode at head dimensions 64, 72, 128, as JSON lines
//!
//! `scripts/gpu-suite` runs `verify` again under compute-sanitizer (`--small`: the definition on the CPU takes its time).
//! A device called "emulator" is this project's own stand-in for tests; its times mean nothing and are not printed.

use std::ffi::{CStr, c_void};
use std::process::ExitCode;
use std::ptr::null_mut;

use cudarc::driver::sys;
use ditfastattn_kernels::cuda::{Device, Stream, is_available};
use ditfastattn_kernels::{
    Attention, Band, DType, Element, Input, Mask, MaskStrides, MaskType, Mode, Output, Shape,
    Strides, oracle,
};
use half::{bf16, f16};

type Fallible<T> = Result<T, Box<dyn std::error::Error>>;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let small = arguments.iter().any(|argument| argument == "--small");
    let result = match arguments.first().map(String::as_str) {
        Some("device") => device(),
        Some("verify") => verify(small),
        Some("time") => time(),
        _ => Err("expected one of: device, verify [--small], time".into()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("gpu_check: {why}");
            ExitCode::FAILURE
        }
    }
}

fn ok(what: &str, result: sys::CUresult) -> Fallible<()> {
    match result {
        sys::CUresult::CUDA_SUCCESS => Ok(()),
        other => Err(format!("{what}: {other:?}").into()),
    }
}

/// The device, with its context current on this thread, and a stream.
fn open() -> Fallible<(&'static Device, sys::CUstream)> {
    if !is_available() {
        return Err("there is no CUDA driver (libcuda.so.1)".into());
    }
    let (mut device, mut context, mut stream) = (0, null_mut(), null_mut());
    // SAFETY: places for the answers; the context stays retained.
    unsafe {
        ok("cuInit", sys::cuInit(0))?;
        ok("cuDeviceGet", sys::cuDeviceGet(&mut device, 0))?;
        ok(
            "cuDevicePrimaryCtxRetain",
            sys::cuDevicePrimaryCtxRetain(&mut context, device),
        )?;
        ok("cuCtxPushCurrent", sys::cuCtxPushCurrent_v2(context))?;
        ok("cuStreamCreate", sys::cuStreamCreate(&mut stream, 0))?;
    }
    // SAFETY: live until the process ends.
    let device = Device::of(unsafe { Stream::from_raw(stream.cast()) })?;
    Ok((device, stream))
}

fn name() -> Fallible<String> {
    let mut device = 0;
    let mut name = [0u8; 128];
    // SAFETY: places for the answers; the name is NUL-terminated.
    unsafe {
        ok("cuDeviceGet", sys::cuDeviceGet(&mut device, 0))?;
        ok(
            "cuDeviceGetName",
            sys::cuDeviceGetName(name.as_mut_ptr().cast(), 128, device),
        )?;
    }
    Ok(CStr::from_bytes_until_nul(&name)?
        .to_string_lossy()
        .into_owned())
}

fn device() -> Fallible<()> {
    let (device, _) = open()?;
    let mut driver = 0;
    // SAFETY: a place for the answer.
    unsafe { ok("cuDriverGetVersion", sys::cuDriverGetVersion(&mut driver))? };
    println!(
        "{{\"name\": {:?}, \"compute_capability\": {}, \"shared_bytes\": {}, \"driver\": {driver}}}",
        name()?,
        device.arch,
        device.limits.shared_bytes
    );
    Ok(())
}

/// Memory that both sides reach.
struct Managed<T> {
    address: u64,
    len: usize,
    element: std::marker::PhantomData<T>,
}

impl<T: Element> Managed<T> {
    fn new(len: usize, mut value: impl FnMut() -> f32) -> Fallible<Self> {
        let mut address = 0;
        // SAFETY: a place for the answer. 1: CU_MEM_ATTACH_GLOBAL.
        let result =
            unsafe { sys::cuMemAllocManaged(&mut address, len.max(1) * size_of::<T>(), 1) };
        ok("cuMemAllocManaged", result)?;
        let memory = Managed::<T> {
            address,
            len,
            element: std::marker::PhantomData,
        };
        for i in 0..len {
            // SAFETY: inside the allocation.
            unsafe { memory.pointer().add(i).write(T::from_f32(value())) };
        }
        Ok(memory)
    }

    fn pointer(&self) -> *mut T {
        self.address as *mut T
    }

    fn values(&self) -> &[T] {
        // SAFETY: `new` has written all of it; no kernel is running when somebody looks.
        unsafe { std::slice::from_raw_parts(self.pointer(), self.len) }
    }
}

impl<T> Drop for Managed<T> {
    fn drop(&mut self) {
        // SAFETY: allocated by `new`, freed once.
        unsafe {
            let _ = sys::cuMemFree_v2(self.address);
        }
    }
}

fn noise(seed: u32) -> impl FnMut() -> f32 {
    let mut x = seed.wrapping_mul(2_654_435_761).wrapping_add(12345);
    move || {
        x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (x >> 8) as f32 / (1 << 22) as f32 - 2.0
    }
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Full,
    Capture,
    Window,
}

const KINDS: [Kind; 3] = [Kind::Full, Kind::Capture, Kind::Window];

/// One call with its tensors, `[batch, tokens, heads, channels]`.
struct Problem<T> {
    shape: Shape,
    band: Band,
    kind: Kind,
    q: Managed<T>,
    k: Managed<T>,
    v: Managed<T>,
    out: Managed<T>,
    residual: Managed<T>,
    mask: Option<Managed<T>>,
    flag: Managed<f32>,
}

impl<T: Element> Problem<T> {
    fn new(shape: Shape, band: Band, kind: Kind, masked: bool, seed: u32) -> Fallible<Self> {
        let s = shape;
        let mut x = noise(seed);
        let q_len = s.batch * s.q_tokens * s.heads;
        let kv_len = s.batch * s.kv_tokens * s.kv_heads;
        Ok(Problem {
            q: Managed::new(q_len * s.head_dim, &mut x)?,
            k: Managed::new(kv_len * s.head_dim, &mut x)?,
            v: Managed::new(kv_len * s.v_dim, &mut x)?,
            out: Managed::new(q_len * s.v_dim, || -77.0)?,
            residual: Managed::new(q_len * s.v_dim, &mut x)?,
            mask: match masked {
                true => Some(Managed::new(s.q_tokens * s.kv_tokens, || {
                    let y = x();
                    if y < -1.0 { f32::NEG_INFINITY } else { y }
                })?),
                false => None,
            },
            flag: Managed::new(1, || 0.0)?,
            shape,
            band,
            kind,
        })
    }

    fn call<R>(&self, f: impl FnOnce(&Attention<'_>) -> R) -> R {
        let s = self.shape;
        let band = self.band;
        let q_strides = Strides::bshd(s.heads, s.q_tokens, s.head_dim);
        let kv_strides = Strides::bshd(s.kv_heads, s.kv_tokens, s.head_dim);
        let o_strides = Strides::bshd(s.heads, s.q_tokens, s.v_dim);
        // SAFETY: all memory is as large as the shape says and lives as long as `self`; kernels are waited for before
        // anybody looks.
        unsafe {
            let input =
                |of: &Managed<T>, strides| Input::from_raw(of.pointer().cast(), T::DTYPE, strides);
            let output =
                |of: &Managed<T>| Output::from_raw(of.pointer().cast(), T::DTYPE, o_strides);
            f(&Attention {
                shape: s,
                scale: 1.0 / (s.head_dim as f32).sqrt(),
                q: input(&self.q, q_strides),
                k: input(&self.k, kv_strides),
                v: input(&self.v, kv_strides),
                mask: self.mask.as_ref().map(|mask| {
                    let strides = MaskStrides {
                        query: s.kv_tokens as isize,
                        key: 1,
                        ..MaskStrides::default()
                    };
                    Mask::from_raw(mask.pointer().cast(), MaskType::Additive(T::DTYPE), strides)
                        .guarded(true)
                }),
                out: output(&self.out),
                mode: match self.kind {
                    Kind::Full => Mode::Full,
                    Kind::Capture => Mode::FullCapture {
                        band,
                        residual: output(&self.residual),
                    },
                    Kind::Window => Mode::Window {
                        band,
                        residual: Some(input(&self.residual, o_strides)),
                    },
                },
            })
        }
    }

    fn launch(&self, device: &Device, stream: sys::CUstream) -> Fallible<()> {
        // SAFETY: as in `call`.
        Ok(self.call(|a| unsafe {
            let stream = Stream::from_raw(stream.cast::<c_void>());
            device.attention(stream, a, self.flag.pointer().cast())
        })?)
    }

    /// What the definition says, in the order of the tensors: output, and residual if one is captured.
    fn truth(&self) -> Fallible<Vec<(Vec<f64>, &Managed<T>)>> {
        let answer = self.call(oracle::attention)?;
        let mut pairs = vec![(self.bshd(&answer.out), &self.out)];
        pairs.extend(answer.residual.map(|r| (self.bshd(&r), &self.residual)));
        Ok(pairs)
    }

    fn bshd(&self, values: &[f64]) -> Vec<f64> {
        let Shape {
            batch,
            heads,
            q_tokens,
            v_dim,
            ..
        } = self.shape;
        let mut transposed = vec![0.0; values.len()];
        for (i, value) in values.iter().enumerate() {
            let (row, channel) = (i / v_dim, i % v_dim);
            let (plane, token) = (row / q_tokens, row % q_tokens);
            let (b, h) = (plane / heads, plane % heads);
            debug_assert!(b < batch);
            transposed[((b * q_tokens + token) * heads + h) * v_dim + channel] = *value;
        }
        transposed
    }
}

/// The largest error that rounding explains: of the type itself and of the probabilities in it.
fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::F32 => 2e-5,
        DType::F16 => 4e-3,
        DType::BF16 => 3e-2,
    }
}

fn verify(small: bool) -> Fallible<()> {
    let (device, stream) = open()?;
    let mut checked = 0;
    let dims: &[usize] = if small {
        &[72]
    } else {
        &[64, 72, 80, 96, 128, 40, 20]
    };
    let tokens: &[usize] = if small {
        &[1, 65, 193]
    } else {
        &[1, 17, 64, 257, 2500]
    };
    for &dim in dims {
        for &tokens in tokens {
            for kind in KINDS {
                for text in [0, tokens / 5] {
                    for masked in [false, true] {
                        let band = Band {
                            half_width: (tokens / 8).max(1),
                            text,
                            text_at_start: dim % 16 == 0,
                        };
                        let heads = if tokens > 1000 { 1 } else { 2 };
                        let shape = Shape {
                            batch: heads,
                            heads,
                            kv_heads: 1,
                            q_tokens: tokens,
                            kv_tokens: tokens,
                            head_dim: dim,
                            v_dim: dim,
                        };
                        checked += 1;
                        one::<f16>(device, stream, shape, band, kind, masked, checked)?;
                        one::<bf16>(device, stream, shape, band, kind, masked, checked)?;
                        if tokens <= 257 {
                            one::<f32>(device, stream, shape, band, kind, masked, checked)?;
                        }
                    }
                }
            }
        }
    }
    println!(
        "{{\"device\": {:?}, \"cases\": {checked}, \"verified\": true}}",
        name()?
    );
    Ok(())
}

fn one<T: Element>(
    device: &Device,
    stream: sys::CUstream,
    shape: Shape,
    band: Band,
    kind: Kind,
    masked: bool,
    seed: u32,
) -> Fallible<()> {
    let p = Problem::<T>::new(shape, band, kind, masked, seed)?;
    let what = format!("{:?} {kind:?} masked {masked} {shape:?} {band:?}", T::DTYPE);
    // Window attention reads the residual and capture overwrites it, so the truth comes first where it is read.
    let before: Option<Vec<f64>> = matches!(kind, Kind::Window)
        .then(|| p.truth())
        .transpose()?
        .map(|mut pairs| pairs.remove(0).0);
    p.launch(device, stream)
        .map_err(|error| format!("{what}: {error}"))?;
    // SAFETY: a live stream.
    unsafe { ok("cuStreamSynchronize", sys::cuStreamSynchronize(stream))? };
    for (want, got) in match before {
        Some(want) => vec![(want, &p.out)],
        None => p.truth()?,
    } {
        for (i, (want, got)) in want.iter().zip(got.values()).enumerate() {
            let error = (f64::from(got.to_f32()) - want).abs();
            if error.is_nan() || error > tolerance(T::DTYPE) {
                return Err(format!(
                    "{what}: element {i} is {}, by definition {want}",
                    got.to_f32()
                )
                .into());
            }
        }
    }
    Ok(())
}

/// Speed of the kernels alone, at the paper's window.
fn time() -> Fallible<()> {
    let (device, stream) = open()?;
    let name = name()?;
    for dim in [64, 72, 128] {
        for tokens in [1024, 4096, 16384] {
            let heads = 16;
            let batch = (32768 / tokens).max(2);
            let shape = Shape {
                batch,
                heads,
                kv_heads: heads,
                q_tokens: tokens,
                kv_tokens: tokens,
                head_dim: dim,
                v_dim: dim,
            };
            for kind in KINDS {
                if name == "emulator" {
                    println!(
                        "{{\"device\": \"emulator\", \"head_dim\": {dim}, \"tokens\": {tokens}, \"mode\": \"{kind:?}\"}}"
                    );
                    continue;
                }
                let p = Problem::<bf16>::new(shape, Band::new(tokens / 8), kind, false, 1)?;
                let milliseconds = median_time(&p, device, stream)?;
                let flops = 4.0 * (batch * heads * tokens * tokens * dim) as f64;
                println!(
                    "{{\"device\": {name:?}, \"type\": \"bfloat16\", \"batch\": {batch}, \"heads\": {heads}, \"head_dim\": {dim}, \
                     \"tokens\": {tokens}, \"mode\": \"{kind:?}\", \"milliseconds\": {milliseconds}, \
                     \"tflops_of_full_attention\": {}}}",
                    flops / milliseconds / 1e9
                );
            }
        }
    }
    Ok(())
}

fn median_time(p: &Problem<bf16>, device: &Device, stream: sys::CUstream) -> Fallible<f64> {
    let mut times = Vec::new();
    let mut events = [null_mut(); 2];
    // SAFETY: places for the answers, live objects.
    unsafe {
        for event in &mut events {
            ok("cuEventCreate", sys::cuEventCreate(event, 0))?;
        }
        for run in 0..25 {
            ok("cuEventRecord", sys::cuEventRecord(events[0], stream))?;
            p.launch(device, stream)?;
            ok("cuEventRecord", sys::cuEventRecord(events[1], stream))?;
            ok("cuStreamSynchronize", sys::cuStreamSynchronize(stream))?;
            let mut elapsed = 0f32;
            ok(
                "cuEventElapsedTime",
                sys::cuEventElapsedTime_v2(&mut elapsed, events[0], events[1]),
            )?;
            if run >= 5 {
                times.push(f64::from(elapsed));
            }
        }
    }
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}
