// The client of ops.v1 and its credential. The credential stays in this tab and is never in a cookie, so no other page
// can make the browser send it.
import { type Client, Code, ConnectError, createClient } from "@connectrpc/connect";
import { createConnectTransport } from "@connectrpc/connect-web";
import { OpsService } from "../../src/gen/ops/v1/ops_pb.js";

const slot = "credential";

/** signIn stores a credential until the tab is closed; "" removes it. */
export function signIn(credential: string): void {
  if (credential) sessionStorage.setItem(slot, credential);
  else sessionStorage.removeItem(slot);
}

export function isSignedIn(): boolean {
  return sessionStorage.getItem(slot) !== null;
}

/** header returns the header of a credential: a token has three parts, an API key has two. */
function header(credential: string): [string, string] {
  return credential.split(".").length === 3 ? ["authorization", `Bearer ${credential}`] : ["x-api-key", credential];
}

export const transport = createConnectTransport({
  // The page is at console/, next to the procedures. A proxy may add a prefix to both paths.
  baseUrl: new URL("..", location.href).href.replace(/\/$/, ""),
  interceptors: [
    (next) => (request) => {
      const credential = sessionStorage.getItem(slot);
      if (credential) request.header.set(...header(credential));
      return next(request);
    },
  ],
});

export const api: Client<typeof OpsService> = createClient(OpsService, transport);

/** reason explains an error to the user. */
export function reason(error: unknown): string {
  const failure = ConnectError.from(error);
  switch (failure.code) {
    case Code.PermissionDenied:
      return "Your roles do not allow this.";
    case Code.Unauthenticated:
      return "You are not signed in, or your credential has expired.";
    case Code.Unavailable:
      return "The service or its database is unavailable.";
    case Code.Unknown:
      return failure.rawMessage === "Failed to fetch" ? "The console's process cannot be reached." : failure.rawMessage;
  }
  return failure.rawMessage;
}

export function isUnauthenticated(error: unknown): boolean {
  return ConnectError.from(error).code === Code.Unauthenticated;
}
