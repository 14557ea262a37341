//! Emulated kernels in a process of their own, so that a sanitizer may end it.

use std::io::{self, Read, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use ditfastattn_kernels::cuda::{Params, Variant};

/// Memory that a kernel's parameters point to.
#[derive(Debug)]
pub struct Buffer<'a> {
    /// Where in the parameters the pointer is, in bytes.
    pub pointer_at: usize,
    pub contents: &'a [u8],
    /// Whether the kernel may change it.
    pub written: bool,
}

/// A running program of [`Sources::program`](crate::Sources::program).
#[derive(Debug)]
pub struct Process {
    child: Child,
    input: Option<ChildStdin>,
    output: ChildStdout,
}

impl Process {
    /// # Panics
    /// If the program cannot be started.
    pub fn start(program: &Path) -> Self {
        let mut child = Command::new(program)
            .env("ASAN_OPTIONS", "detect_leaks=0:abort_on_error=1")
            .env("UBSAN_OPTIONS", "print_stacktrace=1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{}: {error}", program.display()));
        Process {
            input: child.stdin.take(),
            output: child.stdout.take().expect("piped"),
            child,
        }
    }

    /// Launches a kernel and waits for it. Returns the contents of the buffers that are written, in their order.
    ///
    /// # Errors
    /// What the process said if it died: a sanitizer's report, or the emulator's. Nothing can be launched after that.
    pub fn launch<P: Params>(
        &mut self,
        variant: &Variant,
        blocks: u32,
        params: &P,
        buffers: &[Buffer<'_>],
    ) -> Result<Vec<Vec<u8>>, String> {
        self.exchange(variant, blocks, params, buffers)
            .map_err(|error| self.last_words(&error))
    }

    fn exchange<P: Params>(
        &mut self,
        variant: &Variant,
        blocks: u32,
        params: &P,
        buffers: &[Buffer<'_>],
    ) -> io::Result<Vec<Vec<u8>>> {
        let name = variant.name();
        // SAFETY: `Params` have no padding, so all of their bytes are initialised.
        let params = unsafe {
            std::slice::from_raw_parts(std::ptr::from_ref(params).cast::<u8>(), size_of::<P>())
        };
        let mut request = Vec::new();
        let mut number = |n: usize| request.extend_from_slice(&(n as u32).to_le_bytes());
        number(name.len());
        request.extend_from_slice(name.as_bytes());
        for n in [blocks as usize, variant.threads()] {
            request.extend_from_slice(&(n as u32).to_le_bytes());
        }
        request.extend_from_slice(&(variant.shared_bytes() as u64).to_le_bytes());
        request.extend_from_slice(&(params.len() as u32).to_le_bytes());
        request.extend_from_slice(params);
        request.extend_from_slice(&(buffers.len() as u32).to_le_bytes());
        for buffer in buffers {
            for n in [buffer.pointer_at as u32, u32::from(buffer.written)] {
                request.extend_from_slice(&n.to_le_bytes());
            }
            request.extend_from_slice(&(buffer.contents.len() as u64).to_le_bytes());
            request.extend_from_slice(buffer.contents);
        }
        let input = self.input.as_mut().ok_or(io::ErrorKind::BrokenPipe)?;
        input.write_all(&request)?;
        input.flush()?;
        let written = buffers.iter().filter(|buffer| buffer.written);
        written
            .map(|buffer| {
                let mut contents = vec![0; buffer.contents.len()];
                self.output.read_exact(&mut contents)?;
                Ok(contents)
            })
            .collect()
    }

    fn last_words(&mut self, error: &io::Error) -> String {
        self.input = None;
        let mut text = String::new();
        if let Some(mut stderr) = self.child.stderr.take() {
            let _ = stderr.read_to_string(&mut text);
        }
        format!("{error}\n{text}")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.input = None;
        let _ = self.child.wait();
    }
}
