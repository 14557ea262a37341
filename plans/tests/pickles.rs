//! Pickled plans: the authors', and those that want to be more than a plan.

use std::fs;
use std::path::{Path, PathBuf};

use ditfastattn_plans::{Action::*, Cfg, MAX_PLAN_BYTES, Plan, PlanError, PlanErrorKind};
use proptest::prelude::*;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/pickles")
}

fn import(bytes: &[u8]) -> Result<Plan, PlanError> {
    Plan::import(bytes, 0.125, Cfg::UncondFirst)
}

/// The plans that `make.py` has written.
fn written() -> Vec<(String, Vec<u8>)> {
    let mut files: Vec<_> = fs::read_dir(folder())
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e != "py"))
        .map(|path| {
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            (name, fs::read(&path).unwrap())
        })
        .collect();
    files.sort();
    files
}

/// A pickle that is refused, the byte of the refusal, and a part of what is said.
fn refused(bytes: &[u8], offset: usize, message: &str) {
    let error = import(bytes).unwrap_err();
    assert_eq!(error.kind, PlanErrorKind::Pickle, "{error}");
    assert_eq!((error.line, error.column), (1, offset + 1), "{error}");
    assert!(
        error.message.contains(message),
        "{error} should say {message}"
    );
}

#[test]
fn every_way_in_which_python_writes_a_plan() {
    let files = written();
    assert_eq!(files.len(), 9);
    for (name, bytes) in files {
        let plan = import(&bytes).unwrap_or_else(|error| panic!("{name}: {error}"));
        let expected = [
            [Full, Full, Full],
            [WaRsAsc, Asc, Full],
            [Ast, WaRs, Full],
            [Full, Ast, Full],
        ];
        assert_eq!(plan.steps, expected, "{name}");
        assert_eq!((plan.window, plan.cfg), (0.125, Cfg::UncondFirst));
        assert_eq!(plan.validate(), Ok(()), "{name}");
    }
}

#[test]
fn what_would_import_or_call_is_refused_and_named() {
    // os.system("id"), in protocols 0, 2 and 4.
    refused(
        b"(cos\nsystem\n(S'id'\ntR.",
        1,
        "opcode GLOBAL would import",
    );
    refused(
        b"\x80\x02cposix\nsystem\n(X\x02\x00\x00\x00idtR.",
        2,
        "GLOBAL",
    );
    refused(
        b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x02id\x85R.",
        17,
        "STACK_GLOBAL",
    );
    let lone: [(&[u8], &str); 15] = [
        (b"c", "GLOBAL"),
        (b"R", "REDUCE"),
        (b"b", "BUILD"),
        (b"i", "INST"),
        (b"o", "OBJ"),
        (b"\x81", "NEWOBJ"),
        (b"\x92", "NEWOBJ_EX"),
        (b"\x82\x01", "EXT1"),
        (b"\x83\x01\x00", "EXT2"),
        (b"\x84\x01\x00\x00\x00", "EXT4"),
        (b"P0\n", "PERSID"),
        (b"Q", "BINPERSID"),
        (b"\x93", "STACK_GLOBAL"),
        (b"\x97", "NEXT_BUFFER"),
        (b"\x98", "READONLY_BUFFER"),
    ];
    for (opcode, name) in lone {
        let bytes = [b"\x80\x05NN", opcode, b"."].concat();
        refused(
            &bytes,
            4,
            &format!("opcode {name} would import or call code"),
        );
    }
    refused(b"\x80\x03C\x01a.", 2, "SHORT_BINBYTES makes bytes");
    refused(b"\x80\x04\x8f.", 2, "EMPTY_SET");
    refused(b"\x80\x04\xff.", 2, "unknown opcode 0xff");
}

#[test]
fn stack_machines_out_of_order() {
    refused(b"\x80", 1, "ends in the middle");
    refused(b"\x80\x06N.", 0, "protocol 6");
    refused(b"\x80\x02.", 2, "needs a value");
    refused(b"\x80\x02a.", 2, "needs a value");
    refused(b"\x80\x02]a.", 3, "needs a value");
    refused(b"\x80\x02e.", 2, "needs a mark");
    refused(b"\x80\x02(Na.", 4, "needs a value");
    refused(b"\x80\x02NNa.", 4, "what is no list");
    refused(b"\x80\x02]NNs.", 5, "what is no dict");
    refused(b"\x80\x02}(Nu.", 5, "key without a value");
    refused(b"\x80\x02h\x07.", 2, "the memo has no entry 7");
}

#[test]
fn values_that_are_no_plan() {
    refused(b"\x80\x02}(K\x01Nu.", 0, "a key that is no string");
    refused(
        b"\x80\x02]G\x7f\xf0\x00\x00\x00\x00\x00\x00a.",
        0,
        "not finite",
    );
    refused(
        b"\x80\x02\x8a\x11aaaaaaaaaaaaaaaaa.",
        2,
        "more than 128 bits",
    );
    refused(b"\x80\x02X\x01\x00\x00\x00\xff.", 2, "not UTF-8");
    refused(b"(I1x\n.", 1, "not an integer");
    refused(b"(V\\u12\n.", 1, "UNICODE is no text");
    refused(b"(S'a\n.", 1, "STRING is not quoted");
    refused(b"\x80\x02N.N", 4, "1 more bytes follow");

    // What is plain data but no plan is refused as its JSON would be.
    let error = import(b"\x80\x02].").unwrap_err();
    assert_eq!(error.kind, PlanErrorKind::Empty);
    let error = import(b"\x80\x02N.").unwrap_err();
    assert_eq!(error.kind, PlanErrorKind::WrongType);
    let error = import(b"\x80\x02]}X\x05\x00\x00\x00attn1]X\x04\x00\x00\x00fullasa.").unwrap_err();
    assert_eq!(error.kind, PlanErrorKind::UnknownAction);
    assert!(error.message.contains("unknown method `full`"), "{error}");
}

#[test]
fn numbers_and_strings_of_all_kinds_are_read() {
    // A plan's other keys are ignored, but have to be read: here each a list of one kind.
    let mut bytes =
        b"\x80\x02]}(X\x05\x00\x00\x00attn1](X\x09\x00\x00\x00full_attneX\x01\x00\x00\x00x]("
            .to_vec();
    let kinds: [&[u8]; 21] = [
        b"N",
        b"\x88",
        b"\x89",
        b"I00\n",
        b"I01\n",
        b"I-12\n",
        b"L12L\n",
        b"J\xff\xff\xff\xff",
        b"K\x05",
        b"M\x05\x00",
        b"\x8a\x02\x00\xff",
        b"\x8b\x01\x00\x00\x00\x05",
        b"F1.5\n",
        b"G\x3f\xf8\x00\x00\x00\x00\x00\x00",
        b"S'a'\n",
        b"U\x01a",
        b"T\x01\x00\x00\x00a",
        b"Va\\u20ac\\U0001f600\xe9\n",
        b"\x8c\x01a",
        b"\x8d\x01\x00\x00\x00\x00\x00\x00\x00a",
        b")",
    ];
    for kind in kinds {
        bytes.extend(kind);
    }
    // Tuples of one, two and three; a list and a dict from marks; what is popped is gone.
    bytes.extend(b"N\x85NN\x86NNN\x87(NNt(NNl(X\x01\x00\x00\x00aNd(N1N0(0N20");
    bytes.extend(b"eua.");
    assert_eq!(import(&bytes).unwrap().steps, [[Full]]);
}

/// A list that holds the previous one ten times, and so on: 10^n values from n lines.
#[test]
fn a_billion_laughs_are_not_written_out() {
    for depth in [9, 15, 40] {
        let mut bytes = b"\x80\x04]\x94".to_vec();
        for level in 0..depth {
            bytes.extend(b"](");
            for _ in 0..10 {
                bytes.extend([b'h', level]);
            }
            bytes.extend(b"e\x94");
        }
        bytes.push(b'.');
        let error = import(&bytes).unwrap_err();
        assert_eq!(error.kind, PlanErrorKind::Pickle);
        assert!(error.message.contains("more than"), "{error}");
    }
    // One long string, many times.
    let mut bytes = b"\x80\x04](X\x00\x00\x10\x00".to_vec();
    bytes.extend(vec![b'a'; 1 << 20]);
    bytes.push(0x94);
    for _ in 0..100_000 {
        bytes.extend(b"h\x00");
    }
    bytes.extend(b"e.");
    let error = import(&bytes).unwrap_err();
    assert!(error.message.contains("amounts to more than"), "{error}");
}

#[test]
fn nesting_and_loops_end() {
    let mut deep = b"\x80\x02".to_vec();
    deep.extend(vec![b']'; 1 << 20]);
    deep.extend(vec![b'a'; (1 << 20) - 1]);
    deep.push(b'.');
    refused(&deep, 0, "nested more than 16 deep");
    refused(b"\x80\x02]q\x00h\x00a.", 0, "in itself");
    let many = [b"\x80\x02".to_vec(), vec![b'N'; MAX_PLAN_BYTES - 3]].concat();
    refused(&many, 2 + (1 << 20), "more than 1048576 values");
    let many = [b"\x80\x04N".to_vec(), vec![0x94; MAX_PLAN_BYTES - 3]].concat();
    refused(&many, 3 + (1 << 20), "more than 1048576 memo entries");
    for opcode in [b'(', b'2', b'e', b'1'] {
        let many = [b"\x80\x04]".to_vec(), vec![opcode; MAX_PLAN_BYTES - 3]].concat();
        assert!(import(&many).is_err());
    }
}

/// The memo's index is the file's choice, and allocates nothing.
#[test]
fn a_memo_may_begin_anywhere() {
    let bytes = b"\x80\x02]r\xff\xff\xff\xffp18446744073709551615\n}(X\x05\x00\x00\x00attn1](X\x09\x00\x00\x00full_attneuaj\xff\xff\xff\xff0.";
    assert_eq!(import(bytes).unwrap().steps, [[Full]]);
}

#[test]
fn every_truncation_of_every_file_is_refused() {
    for (name, bytes) in written() {
        for cut in 0..bytes.len() {
            let found = import(&bytes[..cut]);
            assert!(found.is_err(), "{name} cut at {cut}");
        }
    }
}

#[test]
fn archives_that_are_no_plan() {
    let read = |name: &str| fs::read(folder().join(name)).unwrap();
    let torch = read("torch.pt");
    // A damaged pickle fails its checksum even where it would still be a plan.
    let at = torch.windows(9).position(|w| w == b"full_attn").unwrap();
    let mut damaged = torch.clone();
    damaged[at] = b'F';
    refused(&damaged, 0, "damaged");

    let mut renamed = torch.clone();
    let names = |bytes: &[u8]| -> Vec<usize> {
        let found = bytes.windows(8).enumerate();
        found
            .filter(|(_, w)| *w == b"data.pkl")
            .map(|(i, _)| i)
            .collect()
    };
    for at in names(&torch) {
        renamed[at] = b'D';
    }
    refused(&renamed, 0, "it has no data.pkl");
    refused(b"PK\x03\x04", 0, "damaged");

    let legacy = read("torch-legacy.pt");
    let keys = b"\x80\x02]q\x00.";
    let mut tensors = legacy.strip_suffix(keys).unwrap().to_vec();
    tensors.extend(b"\x80\x02]X\x01\x00\x00\x000a.");
    let error = import(&tensors).unwrap_err();
    assert!(error.message.contains("the file holds tensors"), "{error}");
}

/// Zeros deflate a thousandfold; no more than a plan's length of them is inflated.
#[test]
fn zip_bombs_are_not_inflated() {
    use std::io::Write;
    let mut out = Vec::new();
    let mut archive = rawzip::ZipArchiveWriter::new(&mut out);
    let file = archive.new_file("x/data.pkl");
    let file = file.compression_method(rawzip::CompressionMethod::DEFLATE);
    let (mut entry, config) = file.start().unwrap();
    let level = flate2::Compression::best();
    let mut writer = config.wrap(flate2::write::DeflateEncoder::new(&mut entry, level));
    for _ in 0..1 << 10 {
        writer.write_all(&[0; 1 << 18]).unwrap();
    }
    let (encoder, descriptor) = writer.finish().unwrap();
    encoder.finish().unwrap();
    entry.finish(descriptor).unwrap();
    archive.finish().unwrap();
    assert!(out.len() < 1 << 20);
    refused(&out, 0, "data.pkl has more than");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn damaged_files_never_panic(file in any::<prop::sample::Index>(), changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4)) {
        let files = written();
        let mut bytes = files[file.index(files.len())].1.clone();
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        let _ = import(&bytes);
    }

    #[test]
    fn arbitrary_opcodes_never_panic(opcodes in prop::collection::vec(prop_oneof![
        prop::sample::select(b"(.0123NI]})ltdaeuspqghrjKMJXSVU\x94\x95\x88\x89\x85\x86\x87\x8a\x8b\x8c\x8d\n1".to_vec()),
        any::<u8>(),
    ], 0..60)) {
        let _ = import(&[b"\x80\x04".to_vec(), opcodes].concat());
    }
}
