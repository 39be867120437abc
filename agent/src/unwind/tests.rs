//! Files of known content, and the files of this machine.

#![expect(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::{
    fs::{self},
    path::{Path, PathBuf},
    time::Instant,
};

use super::*;

fn table(path: &Path, rules: &mut Rules) -> Result<FileTable, NoTable> {
    let file = Arc::new(File::open(path).unwrap());
    build(&file, rules, &Limits::default(), &mut || ())
}

#[test]
fn survey() {
    let mut files: Vec<PathBuf> = Vec::new();
    let mut dirs = vec![PathBuf::from("/usr/bin"), PathBuf::from("/usr/lib")];
    while let Some(dir) = dirs.pop() {
        for e in fs::read_dir(dir).unwrap().flatten() {
            let t = e.file_type().unwrap();
            if t.is_dir() {
                dirs.push(e.path())
            } else if t.is_file() {
                files.push(e.path())
            }
        }
    }
    let mut rules = Rules::default();
    let mut n = 0;
    for f in files {
        let at = Instant::now();
        let before = rules.count();
        match table(&f, &mut rules) {
            Ok(t) => {
                n += 1;
                if t.rows > 10000
                    || t.stats.malformed > 0
                    || t.stats.too_long > 0
                    || t.stats.unsupported > 0
                    || t.stats.idle > 10
                {
                    println!(
                        "{} {} rules {} {:.2} b/row {:?} {:?}",
                        f.display(),
                        t.rows,
                        rules.count() - before,
                        t.bytes as f64 / t.rows as f64,
                        at.elapsed(),
                        t.stats
                    )
                }
            }
            Err(NoTable::NotElf | NoTable::Machine) => {}
            Err(e) => println!("{} {}", f.display(), e.name()),
        }
    }
    println!("{n} files {} rules", rules.count());
}
