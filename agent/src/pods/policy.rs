//! What is kept of a pod, and which pods are asked for: decided once, when a pod is told of.

use std::collections::BTreeMap;

use super::selector::Selector;

/// The annotation that keeps a pod, or a namespace, from being profiled.
pub(super) const OPT_OUT: &str = "podflame.dev/profile";

/// Labels kept unless told otherwise: those that Kubernetes recommends, and their forerunners.
pub const DEFAULT_LABELS: &str = "app,app.kubernetes.io/*,k8s-app";

/// Labels kept of a pod.
const MAX_LABELS: usize = 32;

/// Keys of labels that are kept: in full, or up to a `*` at their end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LabelList(Vec<String>);

impl LabelList {
    /// Whether a label of that key is kept.
    #[must_use]
    pub fn takes(&self, key: &str) -> bool {
        self.0.iter().any(|pattern| match pattern.strip_suffix('*') {
            Some(prefix) => key.starts_with(prefix),
            None => key == pattern,
        })
    }
}

impl Default for LabelList {
    fn default() -> Self {
        Self::from(DEFAULT_LABELS)
    }
}

impl From<&str> for LabelList {
    /// Keys separated by commas; none keeps no label.
    fn from(list: &str) -> Self {
        Self(list.split(',').filter(|key| !key.is_empty()).map(str::to_owned).collect())
    }
}

/// A selection that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SelectError {
    /// No label selector.
    #[error("label selector {0:?}: {1} (use a form such as app=web,tier!=cache)")]
    Selector(String, String),
    /// No name of a pod.
    #[error("pod {0:?}: give it as NAMESPACE/NAME")]
    Pod(String),
}

/// See the module. The default keeps the usual labels and asks for no pod in particular.
#[derive(Clone, Debug, Default)]
pub struct Policy {
    /// Labels that are kept.
    labels: LabelList,
    /// Only these pods, as namespace and name.
    pods: Vec<(String, String)>,
    /// Only pods of these namespaces.
    namespaces: Vec<String>,
    /// Only pods whose labels fit.
    selector: Option<Selector>,
}

impl Policy {
    /// Keeps these labels, and asks for no pod in particular.
    #[must_use]
    pub fn new(labels: LabelList) -> Self {
        Self { labels, ..Self::default() }
    }

    /// Asks for pods that fit each list that is not empty.
    ///
    /// # Errors
    /// When an entry cannot be read.
    pub fn select(
        mut self,
        pods: &[String],
        namespaces: &[String],
        selector: Option<&str>,
    ) -> Result<Self, SelectError> {
        let split = |pod: &String| {
            let (namespace, name) = pod.split_once('/')?;
            let full = !namespace.is_empty() && !name.is_empty() && !name.contains('/');
            full.then(|| (namespace.to_owned(), name.to_owned()))
        };
        let pods = pods.iter().map(|pod| split(pod).ok_or_else(|| SelectError::Pod(pod.clone())));
        self.pods = pods.collect::<Result<_, _>>()?;
        self.namespaces = namespaces.to_vec();
        self.selector = match selector {
            Some(text) => Some(parse(text)?),
            None => None,
        };
        Ok(self)
    }

    /// Whether a pod is one of those asked for.
    pub(super) fn selects(
        &self,
        namespace: &str,
        name: &str,
        labels: &BTreeMap<String, String>,
    ) -> bool {
        (self.pods.is_empty() || self.pods.iter().any(|(ns, n)| ns == namespace && n == name))
            && (self.namespaces.is_empty() || self.namespaces.iter().any(|ns| ns == namespace))
            && self.selector.as_ref().is_none_or(|selector| selector.matches(labels))
    }

    /// The labels that are kept.
    pub(super) fn keep(&self, labels: &BTreeMap<String, String>) -> Box<[(Box<str>, Box<str>)]> {
        let kept = labels.iter().filter(|(key, _)| self.labels.takes(key)).take(MAX_LABELS);
        kept.map(|(key, value)| (super::text(key).into(), super::text(value).into())).collect()
    }
}

fn parse(text: &str) -> Result<Selector, SelectError> {
    Selector::parse(text).map_err(|reason| SelectError::Selector(text.to_owned(), reason))
}

/// Whether annotations let a pod, or what is in a namespace, be profiled.
pub(super) fn profiled(annotations: Option<&BTreeMap<String, String>>) -> bool {
    annotations.and_then(|all| all.get(OPT_OUT)).is_none_or(|value| value != "false")
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests fail by panicking")]

    use super::*;

    fn labels(text: &str) -> BTreeMap<String, String> {
        let pair = |pair: &str| pair.split_once('=').map(|(k, v)| (k.to_owned(), v.to_owned()));
        text.split(',').filter_map(pair).collect()
    }

    #[test]
    fn labels_on_the_list_are_kept() {
        let policy = Policy::default();
        let all = labels("app=web,app.kubernetes.io/name=web,secret=x,application=y");
        let kept: Vec<_> = policy.keep(&all).iter().map(|(key, _)| key.to_string()).collect();
        assert_eq!(kept, ["app", "app.kubernetes.io/name"]);
        assert!(LabelList::from("*").takes("any"));
        assert!(!LabelList::from("").takes("any"));
    }

    #[test]
    fn what_is_asked_for() {
        let takes = |pods: &[&str], namespaces: &[&str], selector: Option<&str>| {
            let own = |list: &[&str]| list.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>();
            let policy = Policy::default();
            let policy = policy.select(&own(pods), &own(namespaces), selector).unwrap();
            policy.selects("shop", "cart-1", &labels("app=cart,tier=back"))
        };
        assert!(takes(&[], &[], None));
        assert!(takes(&["shop/cart-1"], &[], None) && !takes(&["shop/cart"], &[], None));
        assert!(takes(&["other/x", "shop/cart-1"], &["shop"], Some("app=cart,tier!=front")));
        assert!(!takes(&[], &["other"], None) && !takes(&[], &[], Some("app in (a, b)")));
        for pod in ["cart", "/cart", "shop/", "a/b/c"] {
            let error = Policy::default().select(&[pod.to_owned()], &[], None).unwrap_err();
            assert_eq!(error, SelectError::Pod(pod.to_owned()));
        }
        let error = Policy::default().select(&[], &[], Some("app in (")).unwrap_err();
        assert!(error.to_string().contains("app in ("), "{error}");
    }

    #[test]
    fn only_false_opts_out() {
        for (value, expected) in [("false", false), ("true", true), ("", true), ("False", true)] {
            let annotations = labels(&format!("{OPT_OUT}={value}"));
            assert_eq!(profiled(Some(&annotations)), expected, "{value}");
        }
        assert!(profiled(None));
    }
}
