//! Label selectors as `kubectl --selector` takes them
//! (`k8s.io/apimachinery/pkg/labels/selector.go`): `app=web,tier!=cache,env in (a, b),!canary`.

use std::collections::BTreeMap;

/// Requirements that all have to fit.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Selector(Vec<Requirement>);

/// One of them: whether the value of a label is among some.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Requirement {
    key: String,
    /// The values; `None` for any.
    values: Option<Vec<String>>,
    /// It must not be so. A label that is not there fits then.
    not: bool,
}

impl Selector {
    /// Reads one; the error says what is wrong.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let mut all = Vec::new();
        let mut rest = text.trim();
        while !rest.is_empty() {
            let open = rest.find('(').unwrap_or(rest.len());
            let comma = rest.find(',').unwrap_or(rest.len());
            let end = if open < comma {
                let close = rest.find(')').ok_or("a parenthesis is not closed")?;
                rest.get(close + 1..).and_then(|tail| tail.find(',')).map(|at| close + 1 + at)
            } else {
                Some(comma)
            };
            let (one, tail) = rest.split_at(end.unwrap_or(rest.len()));
            all.push(requirement(one.trim())?);
            rest = tail.strip_prefix(',').unwrap_or(tail).trim_start();
        }
        Ok(Self(all))
    }

    /// Whether those labels fit.
    pub(super) fn matches(&self, labels: &BTreeMap<String, String>) -> bool {
        self.0.iter().all(|r| {
            let among = |value: &String| r.values.as_ref().is_none_or(|all| all.contains(value));
            labels.get(&r.key).is_some_and(among) != r.not
        })
    }
}

fn requirement(text: &str) -> Result<Requirement, String> {
    let of = |key: &str, values: Option<Vec<String>>, not| {
        let key = key.trim();
        let clean = !key.is_empty()
            && !key.contains(|c: char| c.is_whitespace() || c.is_control() || "=!()".contains(c));
        if !clean {
            return Err(format!("{key:?} is no key of a label"));
        }
        Ok(Requirement { key: key.to_owned(), values, not })
    };
    if let Some((head, list)) = text.split_once('(') {
        let list = list.trim_end().strip_suffix(')').ok_or("something follows a parenthesis")?;
        let values = list.split(',').map(|value| value.trim().to_owned()).collect();
        let (key, word) = head.trim().rsplit_once(char::is_whitespace).unwrap_or_default();
        return match word {
            "in" => of(key, Some(values), false),
            "notin" => of(key, Some(values), true),
            _ => Err(format!("{text:?}: write KEY in (A, B) or KEY notin (A, B)")),
        };
    }
    if let Some((key, value)) = text.split_once("!=") {
        return of(key, Some(vec![value.trim().to_owned()]), true);
    }
    if let Some((key, value)) = text.split_once('=') {
        let value = value.strip_prefix('=').unwrap_or(value);
        return of(key, Some(vec![value.trim().to_owned()]), false);
    }
    match text.strip_prefix('!') {
        Some(key) => of(key, None, true),
        None => of(text, None, false),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matches(selector: &str, labels: &str) -> Result<bool, String> {
        let pair = |pair: &str| pair.split_once('=').map(|(k, v)| (k.to_owned(), v.to_owned()));
        Ok(Selector::parse(selector)?.matches(&labels.split(',').filter_map(pair).collect()))
    }

    #[test]
    fn selectors_fit_as_kubectl_s_do() {
        let labels = "app=web,tier=front,empty=";
        for fits in [
            "",
            "app=web",
            "app==web",
            "app = web , tier!=back",
            "none!=x",
            "app in (db, web)",
            "app in (web),tier in (front,back)",
            "app notin (db),none notin (x)",
            "app,!none",
            "empty=",
        ] {
            assert_eq!(matches(fits, labels), Ok(true), "{fits}");
        }
        for not in
            ["app=db", "app!=web", "app in (db)", "app notin (web)", "!app", "none", "none=x"]
        {
            assert_eq!(matches(not, labels), Ok(false), "{not}");
        }
        for bad in ["app in (a", "app is (a)", "=x", "a b=c", "app in (a) b", "!", "a=b,,c", "(a)"]
        {
            assert!(matches(bad, labels).is_err(), "{bad}");
        }
    }
}
