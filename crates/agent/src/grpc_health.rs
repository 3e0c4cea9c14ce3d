//! `grpc.health.v1.Health/Check`, as kubelets call it.

use hyper_util::rt::TokioIo;
use tonic::Status;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::Endpoint;
use tower::service_fn;

use crate::fetch::{self, Target};

/// Why an application is not healthy.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Unhealthy {
    #[error("cannot connect: {0}")]
    Connect(#[from] tonic::transport::Error),
    #[error("the server does not implement grpc.health.v1.Health")]
    Unimplemented,
    #[error("{0}")]
    Call(Box<Status>),
    #[error("status {0} is not SERVING")]
    NotServing(i32),
}

#[derive(Clone, PartialEq, prost::Message)]
struct CheckRequest {
    #[prost(string, tag = "1")]
    service: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct CheckResponse {
    /// `grpc.health.v1.HealthCheckResponse.ServingStatus`; 1 is SERVING.
    #[prost(int32, tag = "1")]
    status: i32,
}

/// Asks once.
pub(crate) async fn check(target: Target, service: &str) -> Result<(), Unhealthy> {
    let endpoint = Endpoint::from_shared(format!("http://{}", target.address))?;
    let channel = endpoint
        .connect_with_connector(service_fn(move |_| async move { fetch::connect(target).await.map(TokioIo::new) }))
        .await?;
    let mut client = tonic::client::Grpc::new(channel);
    client.ready().await?;
    let request = tonic::Request::new(CheckRequest { service: service.to_owned() });
    let path = PathAndQuery::from_static("/grpc.health.v1.Health/Check");
    let answer =
        client.unary::<CheckRequest, CheckResponse, _>(request, path, tonic_prost::ProstCodec::default()).await;
    match answer {
        Ok(answer) if answer.get_ref().status == 1 => Ok(()),
        Ok(answer) => Err(Unhealthy::NotServing(answer.get_ref().status)),
        Err(status) if status.code() == tonic::Code::Unimplemented => Err(Unhealthy::Unimplemented),
        Err(status) => Err(Unhealthy::Call(Box::new(status))),
    }
}
