//! Speed of the attention kernels, beside the multiply-add peak of the same machine in the same minute.
//!
//!     cargo bench -p ditfastattn-kernels                    # everything
//!     cargo bench -p ditfastattn-kernels -- --threads 1 --isa avx2 --rounds 50 72x1024
//!
//! Every round runs every case once, so that a noisy neighbour hits all of them alike; best and median are shown.
//! GFLOP/s count the useful work of both products: 2 · pairs · (head_dim + v_dim), a pair being a query and a key it
//! sees. Rates are per thread and second of CPU time, which other programs disturb less than wall time; "wall" is
//! wall time. "share" is CPU time relative to full attention of the same shape, beside the share of pairs.

use std::sync::{Arc, Barrier, Mutex};
use std::time::Instant;

use ditfastattn_kernels::*;
use half::{bf16, f16};
use pulp::{Simd, WithSimd};

fn main() {
    let mut threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    let mut rounds = 15;
    let mut isa = Isa::best();
    let mut filter = Vec::new();
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut number = || args.next().and_then(|x| x.parse().ok()).expect("a number");
        match arg.as_str() {
            "--bench" => {}
            "--threads" => threads = number(),
            "--rounds" => rounds = number(),
            "--isa" => {
                let name = args.next().expect("an instruction set");
                let all = Isa::available();
                isa = *all
                    .iter()
                    .find(|l| format!("{l:?}").eq_ignore_ascii_case(&name))
                    .unwrap_or_else(|| {
                        panic!("no instruction set `{name}` here, there are {all:?}")
                    });
            }
            _ => filter.push(arg),
        }
    }
    println!(
        "{} · {threads} threads · {isa:?} · best (median) of {rounds}",
        cpu_name()
    );
    let pool = Pool::new(threads);

    let mut cases: Vec<Case> = Vec::new();
    for (batch, heads, tokens, dim) in [
        (1, 16, 256, 72),
        (2, 16, 1024, 72),
        (1, 16, 4096, 72),
        (1, 16, 1024, 16),
        (1, 16, 1024, 32),
        (2, 16, 1024, 64),
        (1, 16, 1024, 128),
    ] {
        let text = if tokens == 1024 && dim == 64 { 77 } else { 0 };
        for kind in [
            Kind::Full,
            Kind::Capture,
            Kind::Window,
            Kind::WindowResidual,
        ] {
            cases.push(Case::new::<f32>(
                kind, batch, heads, tokens, dim, text, "f32",
            ));
        }
    }
    // Half precision in both arithmetics, side by side.
    for (tokens, dim) in [
        (256, 72),
        (1024, 16),
        (1024, 64),
        (1024, 72),
        (1024, 128),
        (4096, 64),
        (4096, 72),
        (4096, 128),
    ] {
        for products in [Products::Float32, Products::Bfloat16] {
            for kind in [Kind::Full, Kind::WindowResidual] {
                let case = Case::new::<bf16>(kind, 1, 16, tokens, dim, 0, "bf16");
                cases.push(case.with(products));
            }
            for kind in [Kind::Full, Kind::WindowResidual] {
                let case = Case::new::<f16>(kind, 1, 16, tokens, dim, 0, "f16");
                cases.push(case.with(products));
            }
        }
    }
    for masked in [Masked::Padding, Masked::Causal, Masked::Bias] {
        for kind in [Kind::Full, Kind::Window] {
            let case = Case::new::<f32>(kind, 2, 16, 1024, 72, 0, "f32");
            cases.push(case.masked(masked));
        }
    }
    cases.retain(|c| c.products.available());
    cases.retain(|c| filter.is_empty() || filter.iter().any(|f| c.name().contains(f)));

    let mut peaks = Vec::new();
    let mut times = vec![Vec::new(); cases.len()];
    for round in 0..=rounds {
        let peak = peak(isa, &pool);
        for (case, times) in cases.iter_mut().zip(&mut times) {
            let time = case.run(isa, &pool);
            if round > 0 {
                times.push(time);
            }
        }
        if round > 0 {
            peaks.push(peak);
        }
    }
    peaks.sort_by(|a, b| b.total_cmp(a));
    let peak = peaks[0];
    println!(
        "multiply-add peak of a thread: {peak:.0} ({:.0}) GFLOP/s",
        peaks[peaks.len() / 2]
    );
    println!(
        "{:38} {:>9} {:>9} {:>18} {:>6} {:>15}",
        "case", "wall ms", "cpu ms", "GFLOP/s per thread", "peak", "share (of pairs)"
    );
    let mut full = (0.0, 0.0);
    for (case, times) in cases.iter().zip(&mut times) {
        let wall = times.iter().map(|t| t.wall).fold(f64::INFINITY, f64::min);
        times.sort_by(|a, b| a.cpu.total_cmp(&b.cpu));
        let (best, median) = (times[0].cpu, times[times.len() / 2].cpu);
        let rate = |time: f64| case.flops() / time / 1e9;
        if case.kind == Kind::Full && case.masked.is_none() {
            full = (best, case.pairs());
        }
        println!(
            "{:38} {:9.3} {:9.3} {:9.1} ({:6.1}) {:5.0}% {:7.3} ({:.3})",
            case.name(),
            wall * 1e3,
            best * 1e3,
            rate(best),
            rate(median),
            100.0 * rate(best) / peak,
            best / full.0,
            case.pairs() / full.1
        );
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Full,
    Capture,
    Window,
    WindowResidual,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Masked {
    /// Boolean `[tokens]`: the last eighth is hidden.
    Padding,
    /// Boolean `[tokens, tokens]`.
    Causal,
    /// Float32 `[tokens, tokens]`.
    Bias,
}

/// Numbers that begin on a cache line, as those of a host do.
struct Tensor<T> {
    memory: Vec<T>,
    start: usize,
}

impl<T: Element> Tensor<T> {
    fn new(len: usize, mut number: impl FnMut() -> f32) -> Self {
        let line = 64 / size_of::<T>();
        let mut memory = vec![T::from_f32(0.0); len + line];
        let start = memory.as_ptr().align_offset(64);
        memory.truncate(start + len);
        memory[start..].fill_with(|| T::from_f32(number()));
        Tensor { memory, start }
    }
}

impl<T> std::ops::Deref for Tensor<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.memory[self.start..]
    }
}

impl<T> std::ops::DerefMut for Tensor<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.memory[self.start..]
    }
}

type Call = Box<dyn FnMut(Isa, Products, &Pool, Option<&Mask<'_>>)>;

struct Case {
    kind: Kind,
    shape: Shape,
    band: Band,
    dtype: &'static str,
    products: Products,
    masked: Option<(Masked, Vec<f32>, Vec<u8>)>,
    call: Call,
}

impl Case {
    fn new<T: Element>(
        kind: Kind,
        batch: usize,
        heads: usize,
        tokens: usize,
        dim: usize,
        text: usize,
        dtype: &'static str,
    ) -> Self {
        let shape = Shape {
            batch,
            heads,
            kv_heads: heads,
            q_tokens: tokens,
            kv_tokens: tokens,
            head_dim: dim,
            v_dim: dim,
        };
        let band = Band {
            half_width: (tokens - text) / 8,
            text,
            text_at_start: false,
        };
        let mut seed = 1u32;
        let mut tensor = move || {
            Tensor::<T>::new(batch * heads * tokens * dim, || {
                seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (seed >> 8) as f32 / (1 << 22) as f32 - 2.0
            })
        };
        // Made when first needed: most cases are filtered out.
        let mut tensors = std::cell::OnceCell::new();
        let strides = Strides::bshd(heads, tokens, dim);
        // As the operators keep it.
        let kept = Strides::bhsd(heads, tokens, dim);
        let call = move |isa: Isa, products: Products, pool: &Pool, mask: Option<&Mask<'_>>| {
            tensors.get_or_init(|| [(); 5].map(|()| tensor()));
            let [q, k, v, out, residual] = tensors.get_mut().expect("they were made");
            let a = Attention {
                shape,
                scale: (dim as f32).powf(-0.5),
                q: Input::from_slice(q, strides),
                k: Input::from_slice(k, strides),
                v: Input::from_slice(v, strides),
                mask: mask.copied(),
                out: Output::from_slice(out, strides),
                mode: match kind {
                    Kind::Full => Mode::Full,
                    Kind::Capture => Mode::FullCapture {
                        band,
                        residual: Output::from_slice(residual, kept),
                    },
                    Kind::Window => Mode::Window {
                        band,
                        residual: None,
                    },
                    Kind::WindowResidual => Mode::Window {
                        band,
                        residual: Some(Input::from_slice(residual, kept)),
                    },
                },
            };
            attention_at(&a, pool, isa, products).expect("a valid call");
        };
        Case {
            kind,
            shape,
            band,
            dtype,
            products: Products::Float32,
            masked: None,
            call: Box::new(call),
        }
    }

    fn with(mut self, products: Products) -> Self {
        self.products = products;
        self
    }

    fn masked(mut self, masked: Masked) -> Self {
        let n = self.shape.q_tokens;
        let (bias, shown) = match masked {
            Masked::Padding => (vec![], (0..n).map(|j| u8::from(j < n - n / 8)).collect()),
            Masked::Causal => {
                let causal = |at: usize| u8::from(at % n <= at / n);
                (vec![], (0..n * n).map(causal).collect())
            }
            Masked::Bias => ((0..n * n).map(|at| (at % 7) as f32).collect(), vec![]),
        };
        self.masked = Some((masked, bias, shown));
        self
    }

    fn name(&self) -> String {
        let s = &self.shape;
        format!(
            "{}x{}x{}x{} {} {:?}{}{}",
            s.batch,
            s.heads,
            s.head_dim,
            s.q_tokens,
            self.dtype,
            self.kind,
            match self.products {
                Products::Float32 => "",
                Products::Bfloat16 => " in bf16",
            },
            self.masked
                .as_ref()
                .map_or(String::new(), |m| format!(" {:?}", m.0))
        )
    }

    fn pairs(&self) -> f64 {
        let n = self.shape.q_tokens;
        let seen = match self.kind {
            Kind::Full | Kind::Capture => n * n,
            _ => (0..n)
                .map(|i| (0..n).filter(|&j| self.band.sees(i, j, n)).count())
                .sum(),
        };
        (seen * self.shape.batch * self.shape.heads) as f64
    }

    fn flops(&self) -> f64 {
        2.0 * self.pairs() * (self.shape.head_dim + self.shape.v_dim) as f64
    }

    fn run(&mut self, isa: Isa, pool: &Pool) -> Time {
        let n = self.shape.q_tokens as isize;
        let mask = self.masked.as_ref().map(|(masked, bias, shown)| {
            let strides = MaskStrides {
                query: if *masked == Masked::Padding { 0 } else { n },
                key: 1,
                ..MaskStrides::default()
            };
            match masked {
                Masked::Bias => Mask::additive(bias, strides),
                _ => Mask::boolean(shown, strides),
            }
        });
        let clock = Clock::start();
        (self.call)(isa, self.products, pool, mask.as_ref());
        clock.stop()
    }
}

/// Seconds.
#[derive(Clone, Copy)]
struct Time {
    wall: f64,
    /// Of all threads together.
    cpu: f64,
}

struct Clock(Instant, f64);

impl Clock {
    fn start() -> Self {
        Clock(Instant::now(), cpu_seconds())
    }

    fn stop(self) -> Time {
        Time {
            wall: self.0.elapsed().as_secs_f64(),
            cpu: cpu_seconds() - self.1,
        }
    }
}

/// CPU time of this process so far.
fn cpu_seconds() -> f64 {
    let mut t = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `t` is a timespec to write to.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut t) };
    t.tv_sec as f64 + t.tv_nsec as f64 / 1e9
}

/// GFLOP/s, per thread, of multiply-adds that wait for nothing.
fn peak(isa: Isa, pool: &Pool) -> f64 {
    const STEPS: usize = 400_000;
    struct Burn;
    impl WithSimd for Burn {
        type Output = f64;
        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) -> f64 {
            let fused = std::any::TypeId::of::<S>() != std::any::TypeId::of::<pulp::Scalar256b>();
            let mut acc = [simd.splat_f32s(1.0); 12];
            let x = std::hint::black_box(simd.splat_f32s(0.999));
            for _ in 0..STEPS {
                for a in &mut acc {
                    *a = if fused {
                        simd.mul_add_e_f32s(*a, x, x)
                    } else {
                        simd.add_f32s(simd.mul_f32s(*a, x), x)
                    };
                }
            }
            std::hint::black_box(acc);
            (STEPS * 12 * 2 * S::F32_LANES) as f64
        }
    }
    let tasks = pool.threads * 4;
    let flops = Mutex::new(0.0);
    let clock = Clock::start();
    pool.run(tasks, &|_| {
        let n = isa.run(Burn);
        *flops.lock().unwrap() += n;
    });
    flops.into_inner().unwrap() / clock.stop().cpu / 1e9
}

/// Threads that stay, as an inference server's do.
struct Pool {
    threads: usize,
    start: Arc<Barrier>,
    end: Arc<Barrier>,
    job: Arc<Mutex<Option<Job>>>,
}

#[derive(Clone, Copy)]
struct Job {
    task: *const (dyn Fn(usize) + Sync),
    tasks: usize,
    next: *const std::sync::atomic::AtomicUsize,
}
// SAFETY: `Pool::run` keeps both alive until every thread has passed the barrier after its last use.
unsafe impl Send for Job {}

impl Job {
    fn work(self) {
        // SAFETY: as above.
        let (task, next) = unsafe { (&*self.task, &*self.next) };
        loop {
            let i = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            if i >= self.tasks {
                break;
            }
            task(i);
        }
    }
}

impl Pool {
    fn new(threads: usize) -> Self {
        let pool = Pool {
            threads,
            start: Arc::new(Barrier::new(threads)),
            end: Arc::new(Barrier::new(threads)),
            job: Arc::default(),
        };
        for _ in 1..threads {
            let (start, end, job) = (pool.start.clone(), pool.end.clone(), pool.job.clone());
            std::thread::spawn(move || {
                loop {
                    start.wait();
                    let job = job.lock().unwrap().expect("a job");
                    job.work();
                    end.wait();
                }
            });
        }
        pool
    }
}

impl Parallel for Pool {
    fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        let next = std::sync::atomic::AtomicUsize::new(0);
        // SAFETY: only the lifetime changes; no thread uses the job after the barrier at the end of this function.
        let task = unsafe {
            std::mem::transmute::<
                *const (dyn Fn(usize) + Sync + '_),
                *const (dyn Fn(usize) + Sync + 'static),
            >(task)
        };
        let job = Job {
            task,
            tasks,
            next: &next,
        };
        *self.job.lock().unwrap() = Some(job);
        self.start.wait();
        job.work();
        self.end.wait();
    }
}

fn cpu_name() -> String {
    std::fs::read_to_string("/proc/cpuinfo")
        .ok()
        .and_then(|s| {
            let line = s.lines().find(|l| l.starts_with("model name"))?;
            Some(line.split_once(':')?.1.trim().to_string())
        })
        .unwrap_or_else(|| std::env::consts::ARCH.to_string())
}
