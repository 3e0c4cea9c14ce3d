//! Route tables as bytes, put together from parts: in a table of a thousand services all but the names is the same a
//! thousand times.

use std::sync::Arc;

use envoy_api::route::{
    Decorator, Route, RouteAction, RouteConfiguration, VirtualHost, route_action::ClusterSpecifier,
};
use envoy_api::wire::{encode, field};
use envoy_api::{Message, Resource};
use foldhash::{HashMap, HashMapExt};
use prost::encoding::{WireType, encode_key, encode_varint, encoded_len_varint};
use push_context::{Node, Same, SidecarScope};

use super::action::Made;
use super::virtual_host::{self, Host, Routes};
use crate::context::Context;
use crate::names;

/// Field numbers of envoy/config/route/v3: of `RouteConfiguration`, `VirtualHost` and `Route`.
const VIRTUAL_HOSTS: u32 = 2;
const ROUTES: u32 = 3;
const ROUTE_ACTION: u32 = 2;

/// The route table of that name for a class of proxies without EnvoyFilters: what [`super::outbound`] makes.
pub(crate) fn outbound(cx: &Context<'_>, class: &Arc<Node>, name: &str) -> Resource {
    let Some((host, port)) = super::parse(name) else { return Resource::new(name, &super::outbound(cx, name)) };
    let table = super::table(cx, name, port, host.is_none());
    let mut body = encode(&RouteConfiguration { virtual_hosts: Vec::new(), ..table.clone() });
    let mut encoder = Encoder::new(cx);
    match host {
        Some(host) => {
            // Tables of single services pick from one list.
            #[derive(Eq, Hash, PartialEq)]
            struct Key(Same<Node>, Same<SidecarScope>, u16);
            let key = Key(Same(class.clone()), Same(cx.scope.clone()), port);
            let all = cx.push.memo().get(key, || Arc::new(Domains::of(virtual_host::hosts(cx, name, port))));
            if let Some(own) = all.only(name, host) {
                encoder.put(own, &mut body);
            }
        }
        None => {
            let hosts = virtual_host::hosts(cx, name, port);
            let mut hosts: Vec<&Host> = hosts.iter().collect();
            hosts.sort_by(|a, b| a.named.name.cmp(&b.named.name));
            body.reserve(hosts.len() * 512);
            hosts.iter().for_each(|host| encoder.put(host, &mut body));
            table.virtual_hosts.iter().for_each(|host| put_message(host, &[], &mut body));
        }
    }
    Resource::from_bytes(name, body)
}

/// Virtual hosts by the domains they had: alone in a table each is for all.
struct Domains {
    hosts: Vec<Host>,
    places: HashMap<String, Vec<usize>>,
}

impl Domains {
    fn of(mut hosts: Vec<Host>) -> Domains {
        let mut places: HashMap<String, Vec<usize>> = HashMap::new();
        for (place, host) in hosts.iter_mut().enumerate() {
            for domain in &host.named.domains {
                places.entry(domain.clone()).or_default().push(place);
            }
            host.named = host.named.with(vec!["*".to_owned()]);
        }
        Domains { hosts, places }
    }

    /// The one virtual host with any of two domains.
    fn only(&self, a: &str, b: &str) -> Option<&Host> {
        let mut found = [a, b].into_iter().flat_map(|domain| self.places.get(domain).into_iter().flatten());
        let first = *found.next()?;
        found.all(|place| *place == first).then(|| &self.hosts[first])
    }
}

struct Encoder {
    /// A route to a service, but for names, and its action, but for the cluster.
    route: Arc<[u8]>,
    action: Arc<[u8]>,
    /// The routes encoded last, as a virtual host's field: hosts of one rule follow each other.
    last: Option<(Arc<Vec<Made>>, Vec<u8>)>,
}

impl Encoder {
    fn new(cx: &Context<'_>) -> Encoder {
        let (route, action) = cx.common.plain_route.get((), || {
            let route = super::default_route("", "", RouteAction::default());
            let route = Route { action: None, decorator: None, ..route };
            (encode(&route).into(), encode(&virtual_host::plain_action(cx)).into())
        });
        Encoder { route, action, last: None }
    }

    /// Adds a virtual host to a table.
    fn put(&mut self, Host { named, routes }: &Host, out: &mut Vec<u8>) {
        match routes {
            Routes::Made(routes) => {
                let known = self.last.as_ref().is_some_and(|(last, _)| Arc::ptr_eq(last, routes));
                if !known {
                    let mut bytes = Vec::new();
                    routes.iter().for_each(|route| field(ROUTES, &route.encode(), &mut bytes));
                    self.last = Some((routes.clone(), bytes));
                }
                let routes = self.last.as_ref().map_or(&[][..], |(_, bytes)| bytes);
                put_message(&named.message(), routes, out);
            }
            Routes::Plain(service, port) => out.extend_from_slice(named.plain.get_or_init(|| {
                let (mut route, mut whole) = (Vec::new(), Vec::new());
                self.plain(&service.hostname, *port, &mut route);
                put_message(&named.message(), &route, &mut whole);
                whole.into()
            })),
        }
    }

    /// The route of [`super::default_route`].
    fn plain(&self, hostname: &str, port: u16, out: &mut Vec<u8>) {
        let cluster = ClusterSpecifier::Cluster(names::outbound(port, "", hostname));
        let operation = [hostname, ":", names::Digits::of(port).as_str(), "/*"].concat();
        let decorator = Decorator { operation, ..Decorator::default() };
        let own = Route { decorator: Some(decorator), ..Route::default() };
        let action = cluster.encoded_len() + self.action.len();
        let route = self.route.len() + own.encoded_len() + 1 + encoded_len_varint(action as u64) + action;
        encode_key(ROUTES, WireType::LengthDelimited, out);
        encode_varint(route as u64, out);
        out.extend_from_slice(&self.route);
        encode_key(ROUTE_ACTION, WireType::LengthDelimited, out);
        encode_varint(action as u64, out);
        cluster.encode(out);
        out.extend_from_slice(&self.action);
        own.encode_raw(out);
    }
}

/// Adds a virtual host to a table, with more routes, which are encoded.
fn put_message(host: &VirtualHost, routes: &[u8], out: &mut Vec<u8>) {
    let maps = !host.typed_per_filter_config.is_empty() || !host.routes.is_empty();
    let mut body = if maps { encode(host) } else { host.encode_to_vec() };
    body.extend_from_slice(routes);
    field(VIRTUAL_HOSTS, &body, out);
}
