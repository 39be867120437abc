//! The few shapes of DWARF expressions that occur in call frame information.
//!
//! Expressions are programs for a stack machine (DWARF 5, section 2.5). They are not run here: a rule
//! can only say those that linkers, compilers and the C library are known to write. Not for what the
//! shape means in a rule.

use gimli::{
    Encoding, EndianSlice, LittleEndian, Operation, Register, UnwindExpression, UnwindSection,
};

/// Bytes of a section.
pub(super) type Bytes<'a> = EndianSlice<'a, LittleEndian>;

/// The register of return addresses of x86-64, which stands for the instruction pointer in
/// expressions (psABI, figure 3.36).
const RIP: Register = Register(16);

/// What an expression computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shape {
    /// Register + offset.
    Sum(Register, i64),
    /// What lies at register + offset, + the last number. gcc writes it where it realigns the stack
    /// (its "dynamic realign argument pointer"), OpenSSL where it keeps the caller's stack pointer.
    At(Register, i64, u64),
    /// Register + offset + 8 if the instruction is in its 16 bytes at or behind the last number: the
    /// stubs of procedure linkage tables, as GNU ld writes them (`elf_x86_64_eh_frame_plt` in
    /// `bfd/elfxx-x86.h` and `elf64-x86-64.c`).
    Plt(Register, i64, u64),
}

/// The shape of an expression, if it has one of these.
pub(super) fn shape<'a, S: UnwindSection<Bytes<'a>>>(
    expression: &UnwindExpression<usize>,
    section: &S,
    encoding: Encoding,
) -> Option<Shape> {
    use Operation::{
        And, Deref, Ge, Plus, PlusConstant, RegisterOffset, Shl, UnsignedConstant as Literal,
    };

    let mut operations = expression.get(section).ok()?.operations(encoding);
    let mut next = || operations.next().ok();
    let RegisterOffset { register, offset, .. } = next()?? else { return None };
    match next()? {
        None => Some(Shape::Sum(register, offset)),
        Some(Deref { size, space: false, .. }) if size == encoding.address_size => match next()? {
            None => Some(Shape::At(register, offset, 0)),
            Some(PlusConstant { value }) => {
                next()?.is_none().then_some(Shape::At(register, offset, value))
            }
            Some(_) => None,
        },
        Some(RegisterOffset { register: RIP, offset: 0, .. }) => {
            let Literal { value: 15 } = next()?? else { return None };
            let And = next()?? else { return None };
            let Literal { value: from } = next()?? else { return None };
            let Ge = next()?? else { return None };
            let Literal { value: 3 } = next()?? else { return None };
            let Shl = next()?? else { return None };
            let Plus = next()?? else { return None };
            next()?.is_none().then_some(Shape::Plt(register, offset, from))
        }
        Some(_) => None,
    }
}
