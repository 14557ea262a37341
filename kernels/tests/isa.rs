//! The variables that force an instruction set and a tuning: what they choose, and that nobody gets what the machine lacks.

use std::process::{Command, Output as Ran};

use ditfastattn_kernels::*;

/// Runs under the variables of its parent: says what is used, and computes something.
#[test]
#[ignore = "a child of the other tests"]
fn child() {
    println!("selected={}", Isa::selected().name());
    let shape = Shape {
        batch: 1,
        heads: 2,
        kv_heads: 2,
        q_tokens: 70,
        kv_tokens: 70,
        head_dim: 8,
        v_dim: 8,
    };
    let strides = Strides::bshd(2, 70, 8);
    let x: Vec<f32> = (0..2 * 70 * 8).map(|i| (i % 7) as f32 - 3.0).collect();
    let mut out = vec![0f32; x.len()];
    let call = Attention {
        shape,
        scale: 0.5,
        q: Input::from_slice(&x, strides),
        k: Input::from_slice(&x, strides),
        v: Input::from_slice(&x, strides),
        mask: None,
        out: Output::from_slice(&mut out, strides),
        mode: Mode::Full,
    };
    attention(&call, &Sequential).expect("a valid call");
    let bits: Vec<u32> = out.iter().map(|x| x.to_bits()).collect();
    println!("out={bits:x?}");
}

fn run(isa: Option<&str>, tuning: Option<&str>) -> Ran {
    let mut command = Command::new(std::env::current_exe().expect("a test's own path"));
    command.args(["--exact", "child", "--ignored", "--nocapture"]);
    for (name, value) in [("DITFASTATTN_ISA", isa), ("DITFASTATTN_TUNING", tuning)] {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    let output = command.output().expect("a test can be run");
    assert!(output.status.success(), "{output:?}");
    output
}

fn line(output: &Ran, key: &str) -> String {
    let text = String::from_utf8_lossy(&output.stdout);
    let at = text.find(&format!("{key}=")).expect("a line of the child");
    text[at + key.len() + 1..]
        .lines()
        .next()
        .unwrap_or("")
        .to_owned()
}

fn warnings(output: &Ran) -> usize {
    String::from_utf8_lossy(&output.stderr)
        .matches("is ignored")
        .count()
}

#[test]
fn every_instruction_set_of_the_machine_can_be_forced() {
    let detected = run(None, None);
    assert_eq!(line(&detected, "selected"), Isa::best().name());
    for isa in Isa::available() {
        let forced = run(Some(&isa.name().to_uppercase()), None);
        assert_eq!(line(&forced, "selected"), isa.name());
        assert_eq!(warnings(&forced), 0);
    }
}

#[test]
fn what_the_machine_lacks_is_ignored_with_one_warning() {
    let lacking = Isa::ALL.into_iter().filter(|isa| !isa.is_available());
    let names = lacking.map(Isa::name).chain(["sse9", "avx512 "]);
    for name in names.filter(|name| !Isa::available().iter().any(|isa| isa.name() == name.trim())) {
        let output = run(Some(name), None);
        assert_eq!(line(&output, "selected"), Isa::best().name(), "{name}");
        assert_eq!(warnings(&output), 1, "{output:?}");
    }
    assert_eq!(warnings(&run(Some(""), Some(""))), 0);
}

#[test]
fn no_tuning_changes_a_result() {
    let want = line(&run(None, None), "out");
    for tuning in ["narrow", "NARROW"] {
        let output = run(None, Some(tuning));
        assert_eq!((line(&output, "out"), warnings(&output)), (want.clone(), 0));
    }
    if cfg!(target_arch = "x86_64") {
        for tuning in ["avx512-intel", "avx512-amd"] {
            let output = run(None, Some(tuning));
            assert_eq!((line(&output, "out"), warnings(&output)), (want.clone(), 0));
        }
    }
    let output = run(None, Some("fastest"));
    assert_eq!((line(&output, "out"), warnings(&output)), (want, 1));
}

#[test]
fn what_the_machine_lacks_cannot_be_called() {
    for isa in Isa::ALL.into_iter().filter(|isa| !isa.is_available()) {
        let mut out = [0f32];
        let one = [1f32];
        let (shape, strides) = (
            Shape {
                batch: 1,
                heads: 1,
                kv_heads: 1,
                q_tokens: 1,
                kv_tokens: 1,
                head_dim: 1,
                v_dim: 1,
            },
            Strides::bhsd(1, 1, 1),
        );
        let call = Attention {
            shape,
            scale: 1.0,
            q: Input::from_slice(&one, strides),
            k: Input::from_slice(&one, strides),
            v: Input::from_slice(&one, strides),
            mask: None,
            out: Output::from_slice(&mut out, strides),
            mode: Mode::Full,
        };
        let run = || attention_at(&call, &Sequential, isa, Products::Float32);
        assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)).is_err());
    }
}
