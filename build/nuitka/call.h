/* The door in C (call.c). */
#ifndef NETLOOM_CALL_H
#define NETLOOM_CALL_H

/* The environment variable that tells extension/call.py what happened to a call that was begun here:
 * "<call id> <start on the monotonic clock> <what>". <what> is one of:
 *   broken                     the helper died, or sent what is no answer
 *   hung <inode>               the helper was silent; the inode number of its socket
 *   output <status> <text>     the helper's complete answer, which needs Python to print it
 *   error <status> <text>      the same for an error */
#define BEGUN "NETLOOM_BEGUN"

/* If the arguments are a call of CloudStack's, and the resident helper answers it: print the answer and exit. Returns
 * when Python has to begin the call, or, with BEGUN in the environment, to continue it. */
void call_helper(int argc, char **argv);

#endif
