//! What must not leave the node: the options `--redact` and their like.

use std::path::PathBuf;

use super::Usage;
use crate::redact::Redactor;

/// What to take out of every name, path and address.
#[derive(Clone, Debug, Default, clap::Args)]
#[group(id = "privacy-options")]
pub struct Args {
    /// Take every match of this regular expression out of names, paths and addresses. May be
    /// repeated
    #[arg(long, value_name = "REGEX")]
    pub redact: Vec<String>,

    /// Put a keyed hash in place of every match, the same for the same text. May be repeated
    #[arg(long, value_name = "REGEX")]
    pub redact_hash: Vec<String>,

    /// Which pods may be profiled when it is not known whether they opted out: all of them, or none
    /// (strict), which profiles no pod while its source of names does not answer or may not be asked
    #[arg(long, value_name = "HOW", env = "PODFLAME_OPT_OUT", value_enum, default_value_t = OptOut::Known)]
    pub opt_out: OptOut,

    /// Key of the hashes, at least 32 bytes [default: one that ends with this process]
    #[arg(long, value_name = "FILE", env = "PODFLAME_REDACT_KEY")]
    pub redact_key: Option<PathBuf>,
}

/// What the annotation `podflame.dev/profile: "false"` of a pod or namespace does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum OptOut {
    /// A pod is not profiled once it is known to have opted out.
    #[default]
    Known,
    /// A pod is profiled once it is known not to have opted out.
    Strict,
}

impl Args {
    /// The rules.
    ///
    /// # Errors
    ///
    /// If one cannot be used.
    pub fn redactor(&self) -> Result<Redactor, Usage> {
        let rules = Redactor::new(&self.redact, &self.redact_hash, self.redact_key.as_deref());
        rules.map_err(|e| Usage(e.to_string()))
    }
}
