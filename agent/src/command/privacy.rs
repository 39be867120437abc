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

    /// Key of the hashes, at least 32 bytes [default: one that ends with this process]
    #[arg(long, value_name = "FILE", env = "PODFLAME_REDACT_KEY")]
    pub redact_key: Option<PathBuf>,
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
