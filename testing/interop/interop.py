"""A member's device in another language: Noise, WebSocket, MessagePack, BLAKE3 and Ed25519 of other people's making.

It opens channels to a relay that runs, is refused without a token, and with one pulls everything and checks it by
docs/protocol.md alone. `cargo xtask interop` starts it.
"""

import argparse
import base64
import json
import os
import warnings
from contextlib import ExitStack
from urllib.parse import urlsplit

import msgpack
from blake3 import blake3
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from noise.connection import Keypair, NoiseConnection
from websockets.sync.client import connect

SUITE = b"Noise_XX_25519_ChaChaPoly_BLAKE2s"
PROLOGUE = b"syncshell relay v1"
# A Noise message has at most 65535 bytes: 16 are its tag, and one says whether more of the frame follows.
MAX_PART = 65535 - 16 - 1
PATIENCE = 60
# the library warns of what comes next
warnings.filterwarnings("ignore", message="One of ephemeral keypairs")
# What is drawn once elsewhere is the same in every run here, so that a transcript can be made again from its keys.
DEVICE_EPHEMERAL = bytes(range(0x20, 0x40))
RELAY_EPHEMERAL = bytes(range(0x40, 0x60))
RELAY_STATIC = bytes(range(0x60, 0x80))

HELLO, WELCOME, CHARTER, PUSH_ACK, PULL, PULL_RESPONSE, ERROR = 0x01, 0x02, 0x03, 0x11, 0x20, 0x21, 0xFF
MEMBERSHIP, ALL = 0, 1
REFUSED = 20
NO_CHECK = bytes(8)


class Refused(Exception):
    """The relay said ERROR."""

    def __init__(self, code, text):
        super().__init__(f"{code}: {text}")
        self.code, self.text = code, text


def expect(truth, what):
    if not truth:
        raise SystemExit(f"interop: {what}")


def pack(*fields):
    return msgpack.packb(list(fields), use_bin_type=True)


def handshake(static, ephemeral, initiator):
    noise = NoiseConnection.from_name(SUITE)
    noise.set_prologue(PROLOGUE)
    noise.set_as_initiator() if initiator else noise.set_as_responder()
    noise.set_keypair_from_private_bytes(Keypair.STATIC, static)
    noise.set_keypair_from_private_bytes(Keypair.EPHEMERAL, ephemeral)
    noise.start_handshake()
    return noise


def seal(noise, frame):
    """The messages of a frame."""
    parts = [frame[at : at + MAX_PART] for at in range(0, len(frame), MAX_PART)] or [b""]
    marks = [b"\x01"] * (len(parts) - 1) + [b"\x00"]
    return [bytes(noise.encrypt(mark + part)) for mark, part in zip(marks, parts)]


class Channel:
    """A WebSocket, in it Noise, and in that frames; everything is written down."""

    def __init__(self, address, relay_key, static):
        self.open = ExitStack()
        self.socket = self.open.enter_context(
            connect(address, max_size=1 << 16, open_timeout=PATIENCE, proxy=None)
        )
        noise = handshake(static, DEVICE_EPHEMERAL, initiator=True)
        first = bytes(noise.write_message())
        self.socket.send(first)
        second = self.socket.recv(timeout=PATIENCE)
        # the state is dropped with the last message
        state = noise.noise_protocol.handshake_state
        expect(noise.read_message(second) == b"", "the relay's handshake has a payload")
        shown = state.rs.public_bytes
        third = bytes(noise.write_message())
        self.socket.send(third)
        expect(noise.handshake_finished, "the handshake does not end with the third message")
        expect(shown == relay_key, "the relay proves another key than its address says")
        self.noise = noise
        self.binding = bytes(noise.get_handshake_hash())
        self.handshake = [first, second, third]
        self.said = []

    def send(self, *fields):
        frame = pack(*fields)
        messages = seal(self.noise, frame)
        for message in messages:
            self.socket.send(message)
        self.said.append(("device", frame, messages))

    def receive(self):
        frame, messages = b"", []
        while True:
            message = self.socket.recv(timeout=PATIENCE)
            plain = bytes(self.noise.decrypt(message))
            messages.append(message)
            frame += plain[1:]
            if plain[0] == 0:
                break
            expect(plain[0] == 1 and len(plain) == MAX_PART + 1, "a part of a frame that is not full")
        self.said.append(("relay", frame, messages))
        fields = msgpack.unpackb(frame, raw=False)
        expect(fields[0] == 1, "a frame of another version")
        if fields[1] == ERROR:
            raise Refused(fields[2], fields[3])
        return fields[1], fields[2:]

    def close(self):
        self.open.close()

    def transcript(self, static, relay_key):
        return {
            "device_static": static.hex(),
            "device_ephemeral": DEVICE_EPHEMERAL.hex(),
            "relay_key": relay_key.hex(),
            "handshake": [message.hex() for message in self.handshake],
            "binding": self.binding.hex(),
            "frames": [
                {"from": whose, "frame": frame.hex(), "messages": [message.hex() for message in messages]}
                for whose, frame, messages in self.said
            ],
        }


class Member:
    """What a member shows."""

    def __init__(self, given):
        self.charter = bytes.fromhex(given["charter"])
        self.token = [bytes.fromhex(link) for link in given["token"]]
        self.sign = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(given["sign"]))
        self.author = self.sign.public_key().public_bytes_raw()
        self.noise = bytes.fromhex(given["noise"])
        self.group = blake3(self.charter, derive_key_context="syncshell v1 group id").digest()
        self.replica = blake3(self.author).digest()[:16]
        # of this home's entries; the relay may have more
        self.entries = set(given["entries"])

    def greet(self, channel, token):
        statement = channel.binding + b"\x00" + self.group + self.replica
        proof = self.sign.sign(b"syncshell v1 hello\x00" + statement)
        channel.send(1, CHARTER, self.charter, b"")
        channel.send(1, HELLO, self.group, self.author, self.replica, token, proof)

    def pull(self, channel):
        """Exchanges memberships, and then pulls everything: the envelopes in the order of their cursors."""
        self.greet(channel, self.token)
        channel.send(1, PULL, 1, MEMBERSHIP, 0, NO_CHECK, 1000, [], [])
        first, everything, position = [], [], 0
        asked = answered = welcomed = done = False
        while not done:
            kind, fields = channel.receive()
            if kind == PULL:
                request, scope = fields[:2]
                channel.send(1, PULL_RESPONSE, request, [], 0, NO_CHECK, False, False, 1)
                asked |= scope == MEMBERSHIP
            elif kind == PULL_RESPONSE and fields[0] == 1:
                first += [envelope for _, envelope in fields[1]]
                answered = not fields[4]
            elif kind == PULL_RESPONSE and fields[0] == 2:
                for cursor, envelope in fields[1]:
                    expect(cursor > position, "cursors do not ascend")
                    position = cursor
                    everything.append(envelope)
                channel.send(1, PUSH_ACK, fields[2])
                done = not fields[4]
            if asked and answered and not welcomed:
                welcomed = True
                channel.send(1, WELCOME, self.replica, 0, NO_CHECK, "", [], bytes(8))
                channel.send(1, PULL, 2, ALL, 0, NO_CHECK, 1000, [], [])
        expect(set(first) <= set(everything), "memberships that are not among everything")
        return everything


class Entry:
    """An envelope, taken apart."""

    def __init__(self, envelope):
        fields = msgpack.unpackb(envelope, raw=False)
        expect(len(fields) >= 16 and fields[0] == 1, "an envelope of another form")
        self.sender, self.group = fields[2], fields[3]
        self.payload, self.number, self.previous, self.kind = fields[7], fields[9], fields[10], fields[11]
        expect(envelope[-66:-64] == b"\xc4\x40", "an envelope that does not end in its signature")
        self.signed, self.signature = envelope[:-66], envelope[-64:]
        self.hash = blake3(self.signed + self.signature).digest()

    def verify(self):
        key = Ed25519PublicKey.from_public_bytes(self.sender)
        key.verify(self.signature, b"syncshell v1 envelope\x00" + self.signed)


def check(member, envelopes):
    """Signatures, feeds, and that every author was let in by one who was before."""
    feeds, admitted = {}, {msgpack.unpackb(member.charter, raw=False)[2][0]}
    entries = [Entry(envelope) for envelope in envelopes]
    for entry in entries:
        expect(entry.group == member.group, "an entry of another group")
        try:
            entry.verify()
        except InvalidSignature:
            expect(False, "a signature that does not verify")
        feeds.setdefault(entry.sender, {})[entry.number] = entry
    for feed in feeds.values():
        before = bytes(32)
        for number in range(1, len(feed) + 1):
            expect(number in feed, "a feed with a hole")
            expect(feed[number].previous == before, "a chain that is broken")
            before = feed[number].hash
    grown = True
    while grown:
        known = len(admitted)
        for entry in entries:
            if entry.kind == 1 and entry.sender in admitted:
                operation = msgpack.unpackb(entry.payload, raw=False)
                # operation 1 admits the author whose keys follow what was seen
                if operation[0] == 1:
                    admitted.add(operation[2][0])
        grown = len(admitted) > known
    expect(set(feeds) <= admitted, "an author whom nobody let in")
    expect(member.author in admitted, "the member itself was not let in")
    missing = member.entries - {entry.hash.hex() for entry in entries}
    expect(not missing, f"the relay lacks {len(missing)} entries")
    return len(feeds)


def is_refused(channel, greet):
    """Whether the relay says ERROR 20 to what is shown, and its words."""
    greet(channel)
    try:
        while True:
            channel.receive()
    except Refused as refused:
        expect(refused.code == REFUSED, f"another refusal: {refused}")
        return refused.text
    finally:
        channel.close()


def both_ends():
    """A handshake and frames of which both ends are made here: of long ones the messages' hashes."""
    static = bytes(range(0x20))
    device = handshake(static, DEVICE_EPHEMERAL, initiator=True)
    relay = handshake(RELAY_STATIC, RELAY_EPHEMERAL, initiator=False)
    messages = []
    for writer, reader in ((device, relay), (relay, device), (device, relay)):
        messages.append(bytes(writer.write_message()))
        expect(reader.read_message(messages[-1]) == b"", "a payload")
    expect(device.get_handshake_hash() == relay.get_handshake_hash(), "two bindings of one channel")
    frames = []
    for length in (0, 1, 1000, MAX_PART, MAX_PART + 1, 3 * MAX_PART):
        frame = bytes(at % 251 for at in range(length))
        for whose, sealer, opener in (("device", device, relay), ("relay", relay, device)):
            sealed = seal(sealer, frame)
            for message in sealed:
                opener.decrypt(message)
            frames.append({"from": whose, "length": length, "messages": [blake3(each).hexdigest() for each in sealed]})
    return {
        "device_static": static.hex(),
        "device_ephemeral": DEVICE_EPHEMERAL.hex(),
        "relay_static": RELAY_STATIC.hex(),
        "relay_ephemeral": RELAY_EPHEMERAL.hex(),
        "handshake": [message.hex() for message in messages],
        "binding": bytes(device.get_handshake_hash()).hex(),
        "frames": frames,
    }


def main():
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("relay", help="address of the relay, as it prints it")
    arguments.add_argument("member", help="file with a member's keys")
    arguments.add_argument("transcript", help="file to write what was said into")
    arguments = arguments.parse_args()

    url = urlsplit(arguments.relay)
    address = f"ws://{url.netloc}/v1/channel"
    relay_key = base64.urlsafe_b64decode(url.fragment.split(".")[0] + "=")
    with open(arguments.member, encoding="utf-8") as file:
        member = Member(json.load(file))

    # who is no member hears the same as who names a group that is not there
    stranger = os.urandom(32)
    words = is_refused(Channel(address, relay_key, stranger), lambda channel: member.greet(channel, []))
    other = Member(
        {"charter": member.charter.hex(), "token": [], "sign": os.urandom(32).hex(), "noise": stranger.hex(), "entries": []}
    )
    other.group = os.urandom(32)
    expect(
        is_refused(Channel(address, relay_key, stranger), lambda channel: other.greet(channel, [])) == words,
        "refusals that can be told apart",
    )
    print("interop: refused without a token, and as a stranger, with the same words")

    channel = Channel(address, relay_key, member.noise)
    envelopes = member.pull(channel)
    channel.close()
    authors = check(member, envelopes)
    print(f"interop: pulled {len(envelopes)} entries of {authors} authors; signatures, chains and admissions hold")

    transcript = {"relay": channel.transcript(member.noise, relay_key), "both_ends": both_ends()}
    with open(arguments.transcript, "w", encoding="utf-8") as file:
        json.dump(transcript, file, indent=1)
        file.write("\n")


main()
