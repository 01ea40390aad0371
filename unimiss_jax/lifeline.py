"""Knows at once when another process of the run has died.

A collective that a dead process should have joined never ends, and jax needs a minute and a half to notice. Here every
process holds a connection to process 0 that nobody writes to: when a process ends, however it ends, the system closes
its side; process 0 then tells the others which one it was.
"""
import contextlib
import logging
import secrets
import socket
import threading
import time

import jax

from unimiss_jax import processes
from unimiss_jax.processes import ProcessError

CONNECT_S = 60
NOTICE_S = 5      # a collective may fail a little before the connection is known to be closed


class Lifeline:
  """`lost`: the process that has ended, 'process 3', or None as long as all live. Every process must make one."""

  def __init__(self):
    self.lost = None
    self._peers = []
    if jax.process_count() == 1:
      return
    server = socket.create_server(('', 0), backlog=jax.process_count()) if processes.main() else None
    port, token = processes.gather((server and server.getsockname()[1], secrets.token_hex(8)))[0]
    if server:
      self._thread(self._accept, server, token)
    else:
      self._thread(self._hold, port, token)

  def close(self) -> None:
    for peer in self._peers:
      _shut(peer)

  @contextlib.contextmanager
  def watched(self):
    """A collective that fails because another process is gone becomes a ProcessError."""
    try:
      yield
    except jax.errors.JaxRuntimeError as e:
      end = time.monotonic() + NOTICE_S
      while self._peers and not self.lost and time.monotonic() < end:
        time.sleep(.1)
      if self.lost:
        raise ProcessError(self.message()) from e
      raise

  def message(self) -> str:
    return (f'{self.lost} ended or was cut off. FIX: see its log; the same command on all processes continues from the '
            'last checkpoint')

  def _thread(self, f, *args):
    threading.Thread(target=f, args=args, daemon=True, name='lifeline').start()

  def _accept(self, server, token):
    """Process 0: a thread for each of the others. Whoever does not know the token is none of them."""
    server.settimeout(CONNECT_S)
    missing = jax.process_count() - 1
    while missing:
      try:
        peer, _ = server.accept()
      except OSError as e:
        logging.warning('%d processes did not connect (%s): a death will be noticed late', missing, e)
        return
      peer.settimeout(CONNECT_S)
      said = _line(peer).split()
      if said[:1] != [token]:
        peer.close()
        continue
      missing -= 1
      _keep(peer)
      self._peers.append(peer)
      self._thread(self._listen, peer, f'process {said[1]}')

  def _listen(self, peer, name):
    _line(peer)
    if self.lost is None:
      self.lost = name
      for other in self._peers:
        with contextlib.suppress(OSError):
          other.sendall(f'{name}\n'.encode())
        _shut(other)

  def _hold(self, port, token):
    try:
      peer = socket.create_connection((processes.coordinator_host(), port), CONNECT_S)
      peer.sendall(f'{token} {jax.process_index()}\n'.encode())
    except OSError as e:
      logging.warning('process 0 cannot be reached at port %s (%s): a death will be noticed late', port, e)
      return
    _keep(peer)
    self._peers.append(peer)
    self.lost = _line(peer) or 'process 0'


def _keep(peer) -> None:
  peer.settimeout(None)
  peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


def _shut(peer) -> None:
  """Also ends a recv that another thread waits in, which close() would not."""
  with contextlib.suppress(OSError):
    peer.shutdown(socket.SHUT_RDWR)
  peer.close()


def _line(peer) -> str:
  """Up to a line feed, or to where the other side is gone."""
  out = b''
  with contextlib.suppress(OSError):
    while not out.endswith(b'\n') and (more := peer.recv(1)):
      out += more
  return out.decode(errors='replace').strip()
