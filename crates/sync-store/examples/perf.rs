#![allow(warnings)]
use std::time::Instant;
use rand_chacha::ChaCha20Rng; use rand_core::SeedableRng;
use sync_crypto::author::{AuthorSecret, SignPurpose};
use sync_types::*; use sync_store::*;
fn env(group: GroupId, a:&AuthorSecret, id: AuthorId, n:u64, prev:EnvelopeHash, body:&[u8])->Vec<u8>{
  let h=Header{kind:EnvelopeType::Push,sender:id,group,timestamp:Timestamp(1),nonce:[0;24],blob_id:BlobId(*blake3::hash(&n.to_le_bytes()).as_bytes().first_chunk().unwrap()),number:Number(n),previous:prev,class:Class::Sealed,epoch:EpochId{number:1,hash:[1;32]},commitment:[0;32]};
  let mut d=Draft::new(&h,body.len()).unwrap(); d.payload_mut().copy_from_slice(body);
  let s=a.sign(SignPurpose::Envelope,&[d.signed_bytes()]); d.sign(&s)}
struct W{group:GroupId,a:AuthorSecret,id:AuthorId}
impl SealEntries for W{fn author(&self)->AuthorId{self.id} fn seal(&self,n:Number,p:EnvelopeHash,e:&NewEntry)->Result<Vec<u8>,SealError>{
  let Content::Sealed{body,..}=&e.content else{panic!()};
  let h=Header{kind:EnvelopeType::Push,sender:self.id,group:self.group,timestamp:Timestamp(1),nonce:[0;24],blob_id:e.blob_id,number:n,previous:p,class:Class::Sealed,epoch:EpochId{number:1,hash:[1;32]},commitment:[0;32]};
  let mut d=Draft::new(&h,body.len()).unwrap(); d.payload_mut().copy_from_slice(body);
  let s=self.a.sign(SignPurpose::Envelope,&[d.signed_bytes()]); Ok(d.sign(&s))}}
fn main(){
  let dir=std::path::PathBuf::from(std::env::args().nth(1).unwrap());
  let size:usize=std::env::args().nth(2).unwrap().parse().unwrap();
  let batch:usize=std::env::args().nth(3).unwrap().parse().unwrap();
  let total:u64=std::env::args().nth(4).unwrap().parse().unwrap();
  std::fs::create_dir_all(&dir).unwrap();
  let a=AuthorSecret::from_bytes(&[1;96]); let id=a.id();
  let charter=Charter{kind:GroupKind::Random,founder:a.keys(),quorum:Quorum::default(),suite:1,chunker:Chunker::default(),nonce:[1;32],commitment:[0;32]}.encode();
  let path=dir.join("db"); for s in ["","-wal","-shm"]{let _=std::fs::remove_file(format!("{}{s}",path.display()));}
  let mut db=Db::open(&path,&DbOptions::default(),ChaCha20Rng::from_seed([1;32])).unwrap();
  let other=AuthorSecret::from_bytes(&[2;96]);
  let group=db.write(|t|t.create_group(&charter,other.id())).unwrap();
  let mut prev=EnvelopeHash::NONE; let mut all=vec![];
  let body=vec![7u8;size];
  for n in 1..=total{let e=env(group,&a,id,n,prev,&body); prev=Envelope::parse(&e).unwrap().hash(); all.push(e);}
  let batches:Vec<Vec<Vec<u8>>>=all.chunks(batch).map(|c|c.to_vec()).collect();
  let t=Instant::now();
  for b in &batches{ let r=db.write(|t|t.ingest(&group,b,None,None,&|_|true)).unwrap(); assert_eq!(r.stored.len(),b.len());}
  let d=t.elapsed(); println!("ingest {total} x {size} in {batch}: {:.0}/s {:?}",total as f64/d.as_secs_f64(),d);
  let t=Instant::now();
  struct NoHeld; 
  let mut m=sync_core::Membership::new(&charter).unwrap();
  impl sync_core::Held for NoHeld{type Error=std::convert::Infallible; fn highest(&mut self,_:&AuthorId)->Result<Option<Number>,Self::Error>{Ok(None)} fn at(&mut self,_:&AuthorId,_:Number)->Result<Vec<sync_core::HeldEnvelope>,Self::Error>{Ok(vec![])}}
  for b in &batches{ let _=sync_core::judge(&group,&mut m,&mut NoHeld,b).unwrap();}
  let d=t.elapsed(); println!("judge alone: {:.0}/s",total as f64/d.as_secs_f64());
  let t=Instant::now(); let mut c=Cursor(0); let mut n=0; let sel=sync_core::Selection::everything(Scope::All);
  loop{let b=db.read(|r|r.read_after(&group,c,Limits{entries:4096,bytes:512<<10},&sel,None)).unwrap(); n+=b.entries.len(); c=b.max_cursor; if !b.has_more{break}}
  println!("read_after: {:.0}/s",n as f64/t.elapsed().as_secs_f64());
  let t=Instant::now(); for _ in 0..1{for b in &batches{let r=db.write(|t|t.ingest(&group,b,None,None,&|_|true)).unwrap(); assert_eq!(r.duplicates,b.len());}}
  println!("duplicates: {:.0}/s",total as f64/t.elapsed().as_secs_f64());
  db.close().unwrap();
  println!("file {} MB", std::fs::metadata(&path).unwrap().len()>>20);
  // own
  let p2=dir.join("own"); for s in ["","-wal","-shm"]{let _=std::fs::remove_file(format!("{}{s}",p2.display()));}
  let mut db=Db::open(&p2,&DbOptions::default(),ChaCha20Rng::from_seed([1;32])).unwrap();
  let group=db.write(|t|t.create_group(&charter,a.id())).unwrap();
  let w=W{group,a:a.clone(),id};
  let mk=|n:u64|NewEntry{blob_id:BlobId(*blake3::hash(&n.to_le_bytes()).as_bytes().first_chunk().unwrap()),timestamp:Timestamp(1),content:Content::Sealed{kind:1,stream:"app".into(),body:body.clone()},digest:[0;32]};
  let t=Instant::now(); let k=20000u64;
  let mut i=0; while i<k{ let mut txn=db.begin().unwrap(); for _ in 0..256{ let e=[mk(i)]; txn.attempt(|t|t.append(&group,&e,&w)).unwrap(); i+=1;} txn.commit().unwrap();}
  println!("own, 256 commands a commit: {:.0}/s",i as f64/t.elapsed().as_secs_f64());
  let t=Instant::now(); let mut k2=0; while k2<20000u64{ let e:Vec<_>=(0..500).map(|j|mk(500000+k2+j)).collect(); db.write(|t|t.append(&group,&e,&w)).unwrap(); k2+=500;} println!("own, 500 a call: {:.0}/s",k2 as f64/t.elapsed().as_secs_f64());
  let t=Instant::now(); for e in 0..20000u64{ let _=w.seal(Number(2),prev,&mk(e)).unwrap();} println!("sealing alone: {:.0}/s",20000.0/t.elapsed().as_secs_f64());
  let mut lat:Vec<_>=(0..1000u64).map(|n|{let e=[mk(1000000+n)]; let t=Instant::now(); db.write(|t|t.append(&group,&e,&w)).unwrap(); t.elapsed()}).collect(); lat.sort();
  println!("single: median {:?} p99 {:?} max {:?}",lat[500],lat[990],lat[999]);
}
