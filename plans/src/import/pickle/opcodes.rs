//! The opcodes that are not obeyed, by name.

/// Opcodes that import, call or look up what is not in the file.
const CODE: [(u8, &str); 15] = [
    (b'c', "GLOBAL"),
    (0x93, "STACK_GLOBAL"),
    (b'R', "REDUCE"),
    (b'b', "BUILD"),
    (b'i', "INST"),
    (b'o', "OBJ"),
    (0x81, "NEWOBJ"),
    (0x92, "NEWOBJ_EX"),
    (0x82, "EXT1"),
    (0x83, "EXT2"),
    (0x84, "EXT4"),
    (b'P', "PERSID"),
    (b'Q', "BINPERSID"),
    (0x97, "NEXT_BUFFER"),
    (0x98, "READONLY_BUFFER"),
];

/// Opcodes of harmless types that JSON does not have.
const OTHER_TYPES: [(u8, &str); 7] = [
    (b'B', "BINBYTES"),
    (b'C', "SHORT_BINBYTES"),
    (0x8e, "BINBYTES8"),
    (0x96, "BYTEARRAY8"),
    (0x8f, "EMPTY_SET"),
    (0x90, "ADDITEMS"),
    (0x91, "FROZENSET"),
];

/// What to say of an opcode that is not obeyed.
pub(super) fn refusal(opcode: u8) -> String {
    let name = |opcodes: &[(u8, &'static str)]| {
        let found = opcodes.iter().find(|(code, _)| *code == opcode);
        found.map(|(_, name)| *name)
    };
    if let Some(name) = name(&CODE) {
        return format!(
            "opcode {name} would import or call code; a plan has only lists, dicts and strings, so this is none, and nothing was run"
        );
    }
    match name(&OTHER_TYPES) {
        Some(name) => {
            format!("opcode {name} makes bytes or a set; a plan has only lists, dicts and strings")
        }
        None => format!("unknown opcode 0x{opcode:02x}"),
    }
}
