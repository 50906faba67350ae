//! The control service.

use super::{Roles, gone};
use crate::driver::Handle;
use duet_core::WorkerId;
use duet_core::scheduler::{Command, Verdict};
use duet_proto::convert::{MAX_NAME, clip_reason};
use duet_proto::v1 as wire;
use duet_proto::v1::control_service_server::ControlService;
use duet_service::access;
use tonic::{Request, Response, Status};

/// Steers the run.
pub struct Control {
    handle: Handle,
    roles: Roles,
}

impl Control {
    /// The service in front of a driver.
    pub fn new(handle: Handle, roles: Roles) -> Control {
        Control { handle, roles }
    }

    /// Carries a wish out and returns the generation.
    async fn wish(&self, command: Command) -> Result<u64, Status> {
        tracing::info!(?command, "an operator wants");
        match self.handle.control(command).await.map_err(gone)? {
            Verdict::Refused(reason) => Err(Status::not_found(reason)),
            _ => Ok(self.handle.terms().generation.0),
        }
    }
}

#[tonic::async_trait]
impl ControlService for Control {
    async fn pause(
        &self,
        _: Request<wire::PauseRequest>,
    ) -> Result<Response<wire::PauseResponse>, Status> {
        let generation = self.wish(Command::Pause).await?;
        Ok(Response::new(wire::PauseResponse { generation }))
    }

    async fn resume(
        &self,
        _: Request<wire::ResumeRequest>,
    ) -> Result<Response<wire::ResumeResponse>, Status> {
        let generation = self.wish(Command::Resume).await?;
        Ok(Response::new(wire::ResumeResponse { generation }))
    }

    async fn drain(
        &self,
        request: Request<wire::DrainRequest>,
    ) -> Result<Response<wire::DrainResponse>, Status> {
        let shown = access::role(&request);
        let name = request.into_inner().worker_id;
        if name.len() > MAX_NAME {
            return Err(Status::invalid_argument(format!(
                "the worker's name has {} bytes: at most {MAX_NAME} are taken",
                name.len()
            )));
        }
        let worker = WorkerId(name);
        self.roles.may_drain(shown, &worker)?;
        let generation = self.wish(Command::Drain(worker)).await?;
        Ok(Response::new(wire::DrainResponse { generation }))
    }

    async fn stop(
        &self,
        request: Request<wire::StopRequest>,
    ) -> Result<Response<wire::StopResponse>, Status> {
        let reason = clip_reason(&request.into_inner().reason);
        tracing::info!(reason, "told to stop");
        let generation = self.wish(Command::Stop).await?;
        Ok(Response::new(wire::StopResponse { generation }))
    }
}
