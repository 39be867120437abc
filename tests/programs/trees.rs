//! Trees, strings and recursion, compiled as a release is: without frame pointers.

use std::{collections::BTreeMap, hint::black_box};

fn depth(tree: &BTreeMap<u64, String>, from: u64, left: u32) -> usize {
    if left == 0 {
        return tree.range(from..).take(8).map(|(_, name)| name.len()).sum();
    }
    black_box(depth(tree, from.wrapping_mul(31) % 5000, left - 1)) + 1
}

fn main() {
    let mut sum = 0;
    for round in 0_u64.. {
        let names = (0..500).map(|i| (i * 7919 % 5000, format!("{round}-{i}")));
        let tree: BTreeMap<u64, String> = names.collect();
        sum += depth(&tree, round, 40);
        black_box(sum);
    }
}
