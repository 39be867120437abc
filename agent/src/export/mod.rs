//! Turns a profile into the bytes of a file: flame graph, folded text, pprof or JSON.
//!
//! Pure but for [`write`]: the same profile and options give the same bytes. Names in a profile come
//! from profiled processes and may hold anything; no format here passes a control character on as it
//! is. Not for gRPC, which has its own messages.

pub mod account;
pub mod json;
pub mod pprof;
pub mod retransmits;
pub mod svg;
pub mod top;
pub mod workload;
pub mod write;

use std::{fmt, io, str::FromStr};

use crate::{
    fold::{Root, fold},
    profile::{Profile, Sample},
};

/// A kind of file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// An interactive flame graph, for a browser.
    Svg,
    /// Folded stacks, one a line, for the tools around flame graphs. See [`crate::fold`].
    Folded,
    /// gzip-compressed `profile.proto`, for `go tool pprof` and profile stores. See [`pprof`].
    Pprof,
    /// One JSON document, for scripts. See [`json`].
    Json,
}

impl Format {
    /// Every format.
    pub const ALL: [Self; 4] = [Self::Svg, Self::Folded, Self::Pprof, Self::Json];

    /// The name users type.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Svg => "svg",
            Self::Folded => "folded",
            Self::Pprof => "pprof",
            Self::Json => "json",
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A word that is no [`Format`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown format {0:?} (choose svg, folded, pprof or json)")]
pub struct UnknownFormat(String);

impl FromStr for Format {
    type Err = UnknownFormat;

    fn from_str(text: &str) -> Result<Self, UnknownFormat> {
        let format = Self::ALL.into_iter().find(|f| f.name() == text);
        format.ok_or_else(|| UnknownFormat(text.to_owned()))
    }
}

/// What a file says besides the samples.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Headline of a picture, first comment of a pprof file.
    pub title: String,
    /// The line below it: what was recorded, what was lost; why there is nothing.
    pub subtitle: String,
    /// Outermost frames in SVG and folded text.
    pub root: Root,
    /// [`Profile::start`] as nanoseconds since 1970 (UTC); 0 if unknown. Pure code has no wall clock.
    pub start_unix_ns: i64,
}

/// A file could not be made.
#[derive(Debug, thiserror::Error)]
#[error("make the {format} of a profile: {source}")]
pub struct ExportError {
    /// Which file.
    pub format: Format,
    /// Why.
    pub source: io::Error,
}

/// The bytes of a file.
///
/// # Errors
/// When an encoder fails; none does for lack of samples or for odd names.
pub fn render(
    profile: &Profile,
    format: Format,
    options: &Options,
) -> Result<Vec<u8>, ExportError> {
    let bytes = match format {
        Format::Svg => svg::render(profile, options),
        Format::Folded => Ok(fold(profile, options.root).to_text().into_bytes()),
        Format::Pprof => pprof::render(profile, options),
        Format::Json => json::render(profile, options),
    };
    bytes.map_err(|source| ExportError { format, source })
}

/// The samples in an order that depends on nothing but themselves.
fn sorted(profile: &Profile) -> Vec<&Sample> {
    let mut samples: Vec<&Sample> = profile.samples.iter().collect();
    samples.sort_unstable_by_key(|s| (s.workload, s.pid, s.comm, s.stack, s.weight, s.count));
    samples
}

#[cfg(test)]
pub(crate) mod fixture;
#[cfg(test)]
mod tests;
