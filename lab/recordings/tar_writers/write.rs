// Writes the tar OUT of the members in the text file IN with Rust's crate tar: write FORMAT IN OUT.
// A line of IN is a member: kind, name, link, owner, seconds and text, separated by tabs.
use std::{env, fs};
use tar::{Builder, EntryType, Header};

fn main() {
    let args: Vec<String> = env::args().collect();
    let mut builder = Builder::new(fs::File::create(&args[3]).unwrap());
    for line in fs::read_to_string(&args[2]).unwrap().lines() {
        let cells: Vec<&str> = line.split('\t').collect();
        let mut header = match args[1].as_str() {
            "ustar" => Header::new_ustar(),
            "old" => Header::new_old(),
            _ => Header::new_gnu(),
        };
        header.set_entry_type(match cells[0] {
            "folder" => EntryType::Directory,
            "symlink" => EntryType::Symlink,
            "hardlink" => EntryType::Link,
            _ => EntryType::Regular,
        });
        header.set_mode(0o644);
        header.set_uid(cells[3].parse().unwrap());
        header.set_mtime(cells[4].parse::<f64>().unwrap() as u64);
        header.set_size(cells[5].len() as u64);
        if cells[2].is_empty() {
            builder.append_data(&mut header, cells[1], cells[5].as_bytes()).unwrap();
        } else {
            builder.append_link(&mut header, cells[1], cells[2]).unwrap();
        }
    }
    builder.finish().unwrap();
}
