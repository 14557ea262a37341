//! Prints why plan files are refused, one line per file: `cargo run --example refusal -- FILE…`.

fn main() -> std::io::Result<()> {
    for path in std::env::args().skip(1) {
        match ditfastattn_plans::Plan::parse_bytes(&std::fs::read(&path)?) {
            Ok(_) => println!("{path}\taccepted"),
            Err(error) => println!("{path}\t{:?}\t{error}", error.kind),
        }
    }
    Ok(())
}
