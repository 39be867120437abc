//! A row of call frame information → the rule that the walk can follow.
//!
//! The walk knows three registers of a frame: stack pointer, frame pointer and instruction pointer,
//! and in the innermost frame all of them. A rule says how to find those of the caller. What a rule
//! cannot say is refused: a stack that ends with a reason is better than a frame that never was.

use gimli::{
    CfaRule, FrameDescriptionEntry, Register, RegisterRule, UnwindSection, UnwindTableRow,
};
use object::elf;
use podflame_wire::unwind::{Cfa, Rule, Saved};

use super::{
    expression::{Bytes, Shape, shape},
    rules::bare,
};
use crate::symbols::elf::Elf;

/// A processor whose code can be unwound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Machine {
    X86_64,
    AArch64,
}

type Row = UnwindTableRow<usize>;

impl Machine {
    /// The processor that a file's code is for.
    pub(super) fn of(elf: &Elf) -> Option<Self> {
        match elf.machine {
            _ if !elf.wide() => None,
            kind if kind == elf::EM_X86_64.0 => Some(Self::X86_64),
            kind if kind == elf::EM_AARCH64.0 => Some(Self::AArch64),
            _ => None,
        }
    }

    /// `%rsp` (psABI of x86-64, figure 3.36), SP (DWARF for the Arm 64-bit Architecture, section 4.1).
    fn stack_pointer(self) -> Register {
        Register(if self == Self::X86_64 { 7 } else { 31 })
    }

    /// `%rbp`, X29.
    fn frame_pointer(self) -> Register {
        Register(if self == Self::X86_64 { 6 } else { 29 })
    }

    /// The column of the instruction pointer, X30.
    fn return_address(self) -> Register {
        Register(if self == Self::X86_64 { 16 } else { 30 })
    }

    /// The rule of a row; `None` if no rule can say it.
    pub(super) fn rule<'a, S: UnwindSection<Bytes<'a>>>(
        self,
        row: &Row,
        fde: &FrameDescriptionEntry<Bytes<'a>>,
        section: &S,
    ) -> Option<Rule> {
        let encoding = fde.cie().encoding();
        let shape = |expression: &_| shape(expression, section, encoding);
        let column = fde.cie().return_address_register();
        let return_address = row.register(column);
        if return_address == Some(RegisterRule::Undefined) {
            return Some(bare(Cfa::End));
        }
        if fde.is_signal_trampoline() {
            return self.signal(row, return_address?, shape);
        }
        // Where the stack pointer is not the CFA, frames do not follow one another: `longjmp` and
        // `setcontext` say so of the registers they load.
        match row.register(self.stack_pointer()) {
            None | Some(RegisterRule::ValOffset(0)) => {}
            Some(_) => return None,
        }

        let mut rule = self.cfa(row.cfa(), shape)?;
        (rule.ra, rule.ra_offset) = match return_address {
            Some(RegisterRule::Offset(offset)) => (Saved::AtCfa as u8, offset.try_into().ok()?),
            _ if self == Self::X86_64 => return None,
            None | Some(RegisterRule::SameValue) if column == self.return_address() => {
                (Saved::Same as u8, 0)
            }
            Some(RegisterRule::Expression(expression)) => match shape(&expression)? {
                Shape::Sum(register, offset) if register == self.frame_pointer() => {
                    (Saved::AtFp as u8, offset.try_into().ok()?)
                }
                _ => return None,
            },
            _ => return None,
        };
        (rule.fp, rule.fp_offset) = match row.register(self.frame_pointer()) {
            // Both psABIs have functions keep it for their caller.
            None | Some(RegisterRule::SameValue) => (Saved::Same as u8, 0),
            Some(RegisterRule::Offset(offset)) => (Saved::AtCfa as u8, offset.try_into().ok()?),
            Some(RegisterRule::Expression(expression)) => match shape(&expression) {
                Some(Shape::Sum(register, offset)) if register == self.frame_pointer() => {
                    (Saved::AtFp as u8, offset.try_into().ok()?)
                }
                _ => (Saved::Undefined as u8, 0),
            },
            // Wherever it is, it is lost for the walk, which goes on as long as it needs none.
            Some(_) => (Saved::Undefined as u8, 0),
        };
        Some(rule)
    }

    /// How the CFA is found, in a rule that says nothing else yet.
    fn cfa(
        self,
        cfa: &CfaRule<usize>,
        shape: impl Fn(&gimli::UnwindExpression<usize>) -> Option<Shape>,
    ) -> Option<Rule> {
        let found = match cfa {
            CfaRule::RegisterAndOffset { register, offset } => Shape::Sum(*register, *offset),
            CfaRule::Expression(expression) => shape(expression)?,
        };
        let (sp, fp) = (self.stack_pointer(), self.frame_pointer());
        let (cfa, offset, add) = match found {
            Shape::Sum(register, offset) if register == sp => (Cfa::Sp, offset, 0),
            Shape::Sum(register, offset) if register == fp => (Cfa::Fp, offset, 0),
            Shape::Sum(register, offset) => {
                let mut rule = bare(Cfa::Register);
                rule.cfa_register = register.0.try_into().ok()?;
                rule.cfa_offset = offset.try_into().ok()?;
                return Some(rule);
            }
            Shape::At(register, offset, add) if register == sp => (Cfa::AtSp, offset, add),
            Shape::At(register, offset, add) if register == fp => (Cfa::AtFp, offset, add),
            Shape::Plt(register, 8, from) if register == sp && self == Self::X86_64 => {
                (Cfa::Plt, from.try_into().ok()?, 0)
            }
            Shape::At(..) | Shape::Plt(..) => return None,
        };
        let cfa_offset = offset.try_into().ok()?;
        Some(Rule { cfa_offset, cfa_add: add.try_into().ok()?, ..bare(cfa) })
    }

    /// The frame of a signal handler's return, which the kernel has laid out on the stack: it says for
    /// each register at which distance from the stack pointer it was saved (`do_cfa_expr` and
    /// `do_expr` in glibc's `sysdeps/unix/sysv/linux/x86_64/libc_sigaction.c`).
    ///
    /// What else calls itself a signal frame is refused. The vDSO of AArch64 did up to Linux 5.7; it
    /// led to the link register of the interrupted function and not to that function.
    fn signal(
        self,
        row: &Row,
        return_address: RegisterRule<usize>,
        shape: impl Fn(&gimli::UnwindExpression<usize>) -> Option<Shape>,
    ) -> Option<Rule> {
        let sp = self.stack_pointer();
        let at_sp = |rule: RegisterRule<usize>| match rule {
            RegisterRule::Expression(expression) => match shape(&expression)? {
                Shape::Sum(register, offset) if register == sp => Some(offset),
                _ => None,
            },
            _ => None,
        };
        let CfaRule::Expression(cfa) = row.cfa() else { return None };
        let Shape::At(register, saved_sp, 0) = shape(cfa)? else { return None };
        let same = row.register(sp).is_none_or(|rule| at_sp(rule) == Some(saved_sp));
        if register != sp || !same {
            return None;
        }
        Some(Rule {
            ra: Saved::AtCfa as u8,
            fp: Saved::AtCfa as u8,
            cfa_offset: saved_sp.try_into().ok()?,
            ra_offset: at_sp(return_address)?.try_into().ok()?,
            fp_offset: at_sp(row.register(self.frame_pointer())?)?.try_into().ok()?,
            ..bare(Cfa::Signal)
        })
    }
}
