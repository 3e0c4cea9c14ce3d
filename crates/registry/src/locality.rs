use mesh_types::{ArcStr, Labels};

const REGION: &str = "topology.kubernetes.io/region";
const ZONE: &str = "topology.kubernetes.io/zone";
const SUBZONE: &str = "topology.istio.io/subzone";

/// Where a workload runs.
#[derive(Clone, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Locality {
    /// Such as `us-east`.
    pub region: ArcStr,
    /// Such as `us-east-1a`.
    pub zone: ArcStr,
    /// A rack, or anything smaller than a zone.
    pub subzone: ArcStr,
}

impl Locality {
    /// Reads `region/zone/subzone`; missing parts are empty.
    pub fn parse(text: &str) -> Locality {
        let mut parts = text.splitn(3, '/').map(Into::into);
        let mut next = || parts.next().unwrap_or_default();
        Locality { region: next(), zone: next(), subzone: next() }
    }

    /// The `istio-locality` label, whose separator may be `.` because labels allow no `/`.
    pub(crate) fn label(labels: &Labels) -> Option<String> {
        let text = labels.get("istio-locality").filter(|text| !text.is_empty())?;
        Some(if text.contains('/') { text.clone() } else { text.replace('.', "/") })
    }

    /// From the `istio-locality` label.
    pub fn of_label(labels: &Labels) -> Option<Locality> {
        Some(Locality::parse(&Locality::label(labels)?))
    }

    /// `region/zone/subzone` of a Kubernetes Node's labels.
    pub(crate) fn label_of_node(labels: &Labels) -> Option<String> {
        let get = |name: &str, older: &str| {
            let own = labels.get(name).filter(|value| !value.is_empty());
            own.or_else(|| labels.get(older)).map(String::as_str).unwrap_or_default()
        };
        let region = get(REGION, "failure-domain.beta.kubernetes.io/region");
        let zone = get(ZONE, "failure-domain.beta.kubernetes.io/zone");
        let subzone = get(SUBZONE, "");
        (!region.is_empty() || !zone.is_empty() || !subzone.is_empty()).then(|| format!("{region}/{zone}/{subzone}"))
    }

    /// From labels that the topology was added to; nothing if there is none.
    pub fn of_topology(labels: &Labels) -> Option<Locality> {
        let get = |key: &str| labels.get(key).map(|value| value.as_str().into());
        let (region, zone, subzone) = (get(REGION), get(ZONE), get(SUBZONE));
        (region.is_some() || zone.is_some() || subzone.is_some()).then(|| Locality {
            region: region.unwrap_or_default(),
            zone: zone.unwrap_or_default(),
            subzone: subzone.unwrap_or_default(),
        })
    }

    /// Nothing is known.
    pub fn is_empty(&self) -> bool {
        self.region.is_empty() && self.zone.is_empty() && self.subzone.is_empty()
    }
}

/// Adds where a workload runs to its labels, for `failoverPriority` (istiod `labelutil.AugmentLabels`).
pub fn augment_labels(labels: &Labels, cluster: &str, locality: &Locality, node: &str, network: &str) -> Labels {
    let mut out = labels.clone();
    let mut put = |key: &str, value: &str| {
        if !value.is_empty() {
            out.insert(key.to_owned(), value.to_owned());
        }
    };
    put(REGION, &locality.region);
    put(ZONE, &locality.zone);
    put(SUBZONE, &locality.subzone);
    put("topology.istio.io/cluster", cluster);
    put("kubernetes.io/hostname", node);
    if labels.get("topology.istio.io/network").is_none_or(String::is_empty) {
        put("topology.istio.io/network", network);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn label_separator_may_be_a_dot() {
        let labels = Labels::from([("istio-locality".into(), "us.east.r1".into())]);
        assert_eq!(Locality::of_label(&labels), Some(Locality::parse("us/east/r1")));
        assert!(Locality::parse("").is_empty());
    }
}
