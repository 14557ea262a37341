//! Prints the JSON Schema of plan files.

fn main() {
    println!("{:#}", ditfastattn_plans::json_schema());
}
