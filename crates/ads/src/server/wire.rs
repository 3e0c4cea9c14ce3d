//! Messages of both flavours: requests read, responses written piece by piece.

use bytes::{BufMut, Bytes, BytesMut};
use envoy_api::Resource;
use envoy_api::pb::envoy::config::core::v3::{ControlPlane, Node};
use envoy_api::pb::envoy::service::discovery::v3 as discovery;
use mesh_types::ArcStr;
use prost::Message;
use prost::encoding::{encode_varint, encoded_len_varint};
use tonic::Status;

use super::session::{self, Picked, Response};
use crate::Protocol;

/// Bytes of one piece: the usual frame of HTTP/2.
const CHUNK: usize = 16 << 10;
/// Bodies from this size on are handed over as they are instead of being copied.
const BIG: usize = 8 << 10;

/// The messages of one flavour of the protocol.
pub(super) trait Wire: Send + Sync + 'static {
    const PROTOCOL: Protocol;
    type Request: Message + Default + 'static;
    fn node(request: &Self::Request) -> Option<&Node>;
    fn decode(request: Self::Request) -> session::Request;
    /// The response as a gRPC message.
    ///
    /// # Errors
    /// When it is larger than gRPC can say.
    fn chunks(response: Response) -> Result<Chunks, Status>;
}

pub(super) struct Sotw;
pub(super) struct Delta;

impl Wire for Sotw {
    const PROTOCOL: Protocol = Protocol::StateOfTheWorld;
    type Request = discovery::DiscoveryRequest;

    fn node(request: &Self::Request) -> Option<&Node> {
        request.node.as_ref()
    }

    fn decode(request: Self::Request) -> session::Request {
        session::Request {
            type_url: request.type_url,
            names: request.resource_names,
            nonce: request.response_nonce,
            code: request.error_detail.as_ref().map_or(0, |status| status.code),
            error: request.error_detail.map(|status| status.message),
            ..Default::default()
        }
    }

    fn chunks(response: Response) -> Result<Chunks, Status> {
        let frame = discovery::DiscoveryResponse {
            version_info: response.revision.to_string(),
            type_url: response.type_url.to_string(),
            nonce: response.nonce,
            control_plane: Some(control_plane()),
            ..Default::default()
        };
        Chunks::new(frame.encode_to_vec(), response.type_url, response.resources, Protocol::StateOfTheWorld)
    }
}

impl Wire for Delta {
    const PROTOCOL: Protocol = Protocol::Delta;
    type Request = discovery::DeltaDiscoveryRequest;

    fn node(request: &Self::Request) -> Option<&Node> {
        request.node.as_ref()
    }

    fn decode(request: Self::Request) -> session::Request {
        session::Request {
            type_url: request.type_url,
            names: request.resource_names_subscribe,
            unsubscribe: request.resource_names_unsubscribe,
            initial_versions: request.initial_resource_versions,
            nonce: request.response_nonce,
            code: request.error_detail.as_ref().map_or(0, |status| status.code),
            error: request.error_detail.map(|status| status.message),
        }
    }

    fn chunks(response: Response) -> Result<Chunks, Status> {
        let frame = discovery::DeltaDiscoveryResponse {
            system_version_info: response.revision.to_string(),
            removed_resources: response.removed.iter().map(ToString::to_string).collect(),
            type_url: response.type_url.to_string(),
            nonce: response.nonce,
            control_plane: Some(control_plane()),
            ..Default::default()
        };
        Chunks::new(frame.encode_to_vec(), response.type_url, response.resources, Protocol::Delta)
    }
}

fn control_plane() -> ControlPlane {
    ControlPlane { identifier: format!("outrigger-{}", env!("CARGO_PKG_VERSION")) }
}

/// One response on its way: a list that many share, encoded while it is sent. So a thousand slow clients hold next to
/// nothing, and no response is ever in memory whole.
///
/// Field numbers of envoy/service/discovery/v3/discovery.proto: `resources` is 2 in both responses and the others come
/// before, in any order; of `Resource`, `version` is 1, `resource` 2, `name` 3; of `Any`, `type_url` 1, `value` 2.
#[derive(Debug)]
pub(super) struct Chunks {
    resources: Picked,
    type_url: ArcStr,
    protocol: Protocol,
    /// What goes before the resources, until it is sent.
    head: Option<Bytes>,
    /// The number of the next resource.
    next: usize,
    /// A big body whose own head was sent with what came before it.
    body: Option<Bytes>,
}

impl Chunks {
    fn new(frame: Vec<u8>, type_url: ArcStr, resources: Picked, protocol: Protocol) -> Result<Chunks, Status> {
        let mut chunks = Chunks { resources, type_url, protocol, head: None, next: 0, body: None };
        let total = chunks.resources.iter().map(|resource| chunks.sizes(resource).0).sum::<usize>() + frame.len();
        let total = u32::try_from(total).map_err(|_| Status::resource_exhausted("a response of more than 4 GiB"))?;
        let mut head = BytesMut::with_capacity(5 + frame.len());
        // gRPC: not compressed, length.
        head.put_u8(0);
        head.put_u32(total);
        head.put_slice(&frame);
        chunks.head = Some(head.freeze());
        Ok(chunks)
    }

    /// Bytes of the field, of the `Resource` in it (delta), and of the `Any` in that.
    fn sizes(&self, resource: &Resource) -> (usize, usize, usize) {
        let any = sized(self.type_url.len()) + sized(resource.body.len());
        let inner = match self.protocol {
            Protocol::StateOfTheWorld => any,
            Protocol::Delta => sized(resource.version.len()) + sized(any) + sized(resource.name.len()),
        };
        (sized(inner), inner, any)
    }

    /// The next piece, until there is none.
    pub(super) fn next(&mut self) -> Option<Bytes> {
        if let Some(body) = self.body.take() {
            return Some(body);
        }
        let head = self.head.take();
        if self.next >= self.resources.len() {
            return head;
        }
        let mut out = BytesMut::with_capacity(CHUNK);
        out.put_slice(&head.unwrap_or_default());
        while out.len() < CHUNK {
            let Some(resource) = self.resources.get(self.next) else { break };
            self.next += 1;
            let (_, inner, any) = self.sizes(resource);
            match self.protocol {
                Protocol::StateOfTheWorld => start(2, any, &mut out),
                Protocol::Delta => {
                    start(2, inner, &mut out);
                    field(1, resource.version.as_bytes(), &mut out);
                    field(3, resource.name.as_bytes(), &mut out);
                    start(2, any, &mut out);
                }
            }
            field(1, self.type_url.as_bytes(), &mut out);
            start(2, resource.body.len(), &mut out);
            if resource.body.len() >= BIG {
                self.body = Some(resource.body.clone());
                break;
            }
            out.put_slice(&resource.body);
        }
        Some(out.freeze())
    }
}

/// Bytes of a length-delimited field with a number below 16.
fn sized(length: usize) -> usize {
    1 + encoded_len_varint(length as u64) + length
}

fn start(number: u8, length: usize, out: &mut BytesMut) {
    // Wire type 2: length-delimited.
    out.put_u8(number << 3 | 2);
    encode_varint(length as u64, out);
}

fn field(number: u8, bytes: &[u8], out: &mut BytesMut) {
    start(number, bytes.len(), out);
    out.put_slice(bytes);
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn response(of: &[(&str, usize)]) -> Response {
        let resource = |(name, size): &(&str, usize)| Resource::from_bytes(*name, vec![7; *size]);
        Response {
            type_url: "type.googleapis.com/x".into(),
            nonce: "n".into(),
            revision: 3,
            resources: Picked::all(of.iter().map(resource).collect::<Arc<[Resource]>>()),
            removed: vec!["gone".into()],
        }
    }

    fn message(mut chunks: Chunks) -> Vec<u8> {
        let whole: Vec<u8> = std::iter::from_fn(|| chunks.next()).flatten().collect();
        assert_eq!(whole[0], 0);
        assert_eq!(u32::from_be_bytes(whole[1..5].try_into().unwrap()) as usize, whole.len() - 5);
        whole[5..].to_vec()
    }

    #[test]
    fn pieces_make_the_message() {
        let of = [("a", 0), ("b", 10), ("big", 3 * CHUNK), ("c", BIG - 1), ("d", BIG - 1), ("e", BIG - 1)];
        let delta =
            discovery::DeltaDiscoveryResponse::decode(&*message(Delta::chunks(response(&of)).unwrap())).unwrap();
        assert_eq!((delta.nonce.as_str(), delta.removed_resources), ("n", vec!["gone".to_owned()]));
        let got: Vec<_> =
            delta.resources.iter().map(|r| (&*r.name, r.resource.as_ref().unwrap().value.len())).collect();
        assert_eq!(got, of);
        assert_eq!(delta.resources[1].version, *Resource::from_bytes("b", vec![7; 10]).version);
        assert_eq!(delta.resources[0].resource.as_ref().unwrap().type_url, "type.googleapis.com/x");
        let sotw = discovery::DiscoveryResponse::decode(&*message(Sotw::chunks(response(&of)).unwrap())).unwrap();
        assert_eq!(sotw.version_info, "3");
        let got: Vec<_> = sotw.resources.iter().map(|any| any.value.len()).collect();
        assert_eq!(got, of.map(|(_, size)| size));
        assert!(!message(Delta::chunks(response(&[])).unwrap()).is_empty());
    }
}
