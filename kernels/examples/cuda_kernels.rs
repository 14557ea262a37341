//! Compiles the CUDA kernels ahead of time with nvcc, and checks what the compiler made of them.
//!
//!     cargo run --release -p ditfastattn-kernels --example cuda_kernels -- --nvcc NVCC --out DIR [--arches 80,90] [--table FILE] [MODULE...]
//!
//! Writes one fatbin per module, with machine code for compute capabilities 8.0, 9.0, 10.0 and 12.0 (or those of `--arches`) and
//! PTX of 8.0 for what comes later, and the hash of the sources. Fails if a kernel spills registers or is over its budget.
//! `scripts/cuda-kernels` gets the compiler and calls this.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use ditfastattn_kernels::cuda::{MANIFEST, SOURCES, Variant, source_hash, translation_units};

const ARCHES: [u32; 4] = [80, 90, 100, 120];

/// What ptxas says of one kernel on one architecture.
#[derive(Clone, Copy, Debug, Default)]
struct Usage {
    registers: usize,
    spilled_bytes: usize,
    stack_bytes: usize,
}

type Usages = BTreeMap<(String, u32), Usage>;

fn main() -> ExitCode {
    match run(std::env::args().skip(1)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("cuda_kernels: {why}");
            ExitCode::FAILURE
        }
    }
}

fn run(mut arguments: impl Iterator<Item = String>) -> Result<(), String> {
    let mut arches = ARCHES.to_vec();
    let (mut nvcc, mut out, mut table, mut modules) = (None, None, None, Vec::new());
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().ok_or(format!("{argument} needs a value"));
        match argument.as_str() {
            "--nvcc" => nvcc = Some(PathBuf::from(value()?)),
            "--out" => out = Some(PathBuf::from(value()?)),
            "--table" => table = Some(PathBuf::from(value()?)),
            "--arches" => {
                let numbers = value()?;
                let numbers: Result<_, std::num::ParseIntError> =
                    numbers.split(',').map(str::parse).collect();
                arches = numbers.map_err(|error| format!("--arches: {error}"))?;
            }
            option if option.starts_with('-') => return Err(format!("unknown option {option}")),
            _ => modules.push(argument),
        }
    }
    let nvcc = nvcc.ok_or("--nvcc is missing")?;
    let out = out.ok_or("--out is missing")?;

    let variants = Variant::all();
    let mut units = translation_units(&variants);
    if !modules.is_empty() {
        units.retain(|module, _| modules.contains(module));
    }
    let sources = out.join("src");
    std::fs::create_dir_all(&sources).map_err(|error| format!("{}: {error}", sources.display()))?;
    for (name, text) in SOURCES {
        write(&sources.join(name), text)?;
    }
    let usages = compile(&nvcc, &out, &units, &arches)?;
    let expected = variants
        .iter()
        .filter(|variant| units.contains_key(&variant.module()));
    let report = report(expected, &usages, &arches)?;
    if modules.is_empty() {
        write(&out.join(MANIFEST), &source_hash())?;
    }
    if let Some(table) = table {
        write(&table, &report)?;
    }
    println!(
        "{}: {} kernels, no spills, budgets kept",
        out.display(),
        usages.len() / arches.len()
    );
    Ok(())
}

/// Compiles every unit; as many at a time as there are processors.
fn compile(
    nvcc: &Path,
    out: &Path,
    units: &BTreeMap<String, String>,
    arches: &[u32],
) -> Result<Usages, String> {
    let units: Vec<_> = units.iter().collect();
    let next = AtomicUsize::new(0);
    let results = Mutex::new((Usages::new(), Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                while let Some((module, text)) = units.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let result = compile_one(nvcc, out, module, text, arches);
                    let mut results = results.lock().expect("no compilation panics");
                    match result {
                        Ok(usages) => results.0.extend(usages),
                        Err(why) => results.1.push(why),
                    }
                }
            });
        }
    });
    let (usages, errors) = results.into_inner().expect("no compilation panics");
    if errors.is_empty() {
        Ok(usages)
    } else {
        Err(errors.join("\n"))
    }
}

fn compile_one(
    nvcc: &Path,
    out: &Path,
    module: &str,
    text: &str,
    arches: &[u32],
) -> Result<Usages, String> {
    let source = out.join("src").join(format!("unit_{module}.cu"));
    write(&source, text)?;
    let mut command = Command::new(nvcc);
    command.args([
        "--fatbin",
        "-std=c++17",
        "-O3",
        "--compress-mode=size",
        "-Xptxas",
        "-v",
    ]);
    for &arch in arches {
        command.arg(format!("-gencode=arch=compute_{arch},code=sm_{arch}"));
    }
    command.arg("-gencode=arch=compute_80,code=compute_80");
    command.arg(&source).arg("-o");
    command.arg(out.join(module).with_extension("fatbin"));
    let output = command
        .output()
        .map_err(|error| format!("{}: {error}", nvcc.display()))?;
    let said = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        return Err(format!("{module}:\n{said}"));
    }
    Ok(parse(&said))
}

/// Reads what `-Xptxas -v` prints: a line that names a kernel and an architecture, one with its stack and spills, one with its
/// registers.
fn parse(said: &str) -> Usages {
    let mut usages = Usages::new();
    let mut at = None;
    for line in said.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function '") {
            let (name, rest) = rest.split_once('\'').unwrap_or_default();
            let arch = rest.split_once("sm_").and_then(|(_, arch)| {
                arch.trim_end_matches(|c: char| !c.is_ascii_digit())
                    .parse()
                    .ok()
            });
            at = arch.map(|arch| (name.to_owned(), arch));
        }
        let Some(at) = &at else { continue };
        let number_before = |text: &str| -> Option<usize> {
            line.split_once(text)?
                .0
                .split_whitespace()
                .next_back()?
                .parse()
                .ok()
        };
        let usage = usages.entry(at.clone()).or_default();
        if let Some(stack) = number_before(" bytes stack frame") {
            usage.stack_bytes = stack;
            usage.spilled_bytes = number_before(" bytes spill stores").unwrap_or(0)
                + number_before(" bytes spill loads").unwrap_or(0);
        }
        if let Some(registers) = number_before(" registers") {
            usage.registers = registers;
        }
    }
    usages
}

/// A table of registers; an error that lists the kernels that are not as they should be.
fn report<'a>(
    variants: impl Iterator<Item = &'a Variant>,
    usages: &Usages,
    arches: &[u32],
) -> Result<String, String> {
    let mut table = String::from("| kernel | threads | shared memory | registers: budget |");
    let mut faults = String::new();
    for &arch in arches {
        let _ = write!(table, " sm_{arch} |");
    }
    table += "\n|---|---:|---:|---:|";
    table += &"---:|".repeat(arches.len());
    table += "\n";
    for variant in variants {
        let name = variant.name();
        let (threads, shared) = (variant.threads(), variant.shared_bytes());
        let budget = variant.register_budget();
        let _ = write!(table, "| `{name}` | {threads} | {shared} | {budget} |");
        for &arch in arches {
            let Some(usage) = usages.get(&(name.clone(), arch)) else {
                let _ = writeln!(
                    faults,
                    "{name} on sm_{arch}: the compiler says nothing of it"
                );
                continue;
            };
            let _ = write!(table, " {} |", usage.registers);
            if usage.spilled_bytes > 0 || usage.stack_bytes > 0 || usage.registers > budget {
                let _ = writeln!(
                    faults,
                    "{name} on sm_{arch}: {usage:?}, expected no spills, no stack, at most {budget} registers"
                );
            }
        }
        table += "\n";
    }
    if faults.is_empty() {
        Ok(table)
    } else {
        Err(faults)
    }
}

fn write(path: &Path, text: &str) -> Result<(), String> {
    std::fs::write(path, text).map_err(|error| format!("{}: {error}", path.display()))
}
